"""Seconds, peak memory and bytes of an export, beside transformers' own exporter.

python samples/bench/export_cost.py            1.4 B, fp16: link, copy, transformers
python samples/bench/export_cost.py --big      7 B from sparse files: link and copy

Every export is a process of its own, timed from start to end, imports included; ours with
--no-verify, as the other does not verify either. transformers gets its weights from the same
folder, and a prompt of one image. Ours exports the vision encoder, the embedding and the decoder;
what transformers exports is listed.
"""

import shutil
import sys
from pathlib import Path
from statistics import median

from measure import (
    GIB,
    MIB,
    Usage,
    checkpoint,
    export,
    folder_bytes,
    head,
    in_turns,
    parser,
    python,
    ratio,
    table,
    verdict,
    work,
)

PEER = "transformers"
TIME_BARS = {"link": 1 / 5, "copy": 1 / 2}  # of the peer's
MEMORY_BARS = {"link": 1 / 4, "copy": 1 / 3}
BIG_BARS = {"link": (40.0, 1 * GIB), "copy": (None, 1.5 * GIB)}
SCHEDULE = "version: 1\nprefill:\n  stages: [{before_layer: 2, keep: 50%}]\n"


class Run:
    """One way to export; ``files`` is what the latest call left behind, in bytes."""

    def __init__(self, name: str, model: Path, folder: Path, dtype: str) -> None:
        self.name, self.model, self.out, self.dtype = name, model, folder / f"out-{name}", dtype
        self.schedule, self.files = folder / "schedule.yaml", 0
        self.schedule.write_text(SCHEDULE)

    def __call__(self) -> Usage:
        """Export into a folder that is gone afterwards."""
        if self.name == PEER:
            usage = python("peers.py", "transformers-whole", self.model, self.out)
        else:
            usage = export(self.model, self.out, self.schedule, dtype=self.dtype, weights=self.name)
        self.files = folder_bytes(self.out)
        shutil.rmtree(self.out)
        return usage


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--big", action="store_true", help="the 7 B shape, without a peer")
    options.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp16")
    options.set_defaults(runs=3)
    args = options.parse_args()
    shape = "tiny" if args.tiny else "llava-7b" if args.big else "llava-1.4b"
    names = ["link", "copy"] if args.big else ["link", "copy", PEER]
    with work(args.work) as folder:
        model = checkpoint(shape, folder, args.dtype, sparse=args.big)
        weights = folder_bytes(model)
        sides = {name: Run(name, model, folder, args.dtype) for name in names}
        found = in_turns(sides, args.runs, warmup=False)
        files = {name: run.files for name, run in sides.items()}
    size = f"{weights / GIB:.2f} GiB of weights"
    print(head(shape, args.dtype, size, f"{args.runs} rounds in turns"))
    met = _big(found, files) if args.big else _beside(found, files)
    sys.exit(0 if met or args.tiny else 1)


def _beside(found: dict[str, list[Usage]], files: dict[str, int]) -> bool:
    rows = [("", "seconds", "of transformers", "bar", "", "peak RSS", "of transformers", "bar", "",
             "files")]  # fmt: skip
    peer, all_met = found[PEER], True
    for name, own in found.items():
        seconds = ratio([u.seconds for u in own], [u.seconds for u in peer])
        memory = ratio([u.peak_bytes for u in own], [u.peak_bytes for u in peer])
        bars = TIME_BARS.get(name), MEMORY_BARS.get(name)
        cells = [
            ("", "") if bar is None else (f"<= {bar:.3f}", verdict(value <= bar))
            for value, bar in zip((seconds, memory), bars, strict=True)
        ]
        all_met = all_met and ("MISSED" not in cells[0] + cells[1])
        rows.append((name, *_seconds(own), f"{seconds:.3f}", *cells[0], *_memory(own),
                     f"{memory:.3f}", *cells[1], f"{files[name] / GIB:.2f} GiB"))  # fmt: skip
    print(table(rows))
    report = peer[-1].report
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["steps"].items())
    print(f"\ntransformers: {steps}; components {', '.join(report['components'])}")
    for name in ("link", "copy"):
        print(f"{name}: {_own_steps(found[name][-1])}")
    return all_met


def _big(found: dict[str, list[Usage]], files: dict[str, int]) -> bool:
    rows, all_met = [("", "seconds", "bar", "", "peak RSS", "bar", "", "files")], True
    for name, own in found.items():
        limit, most = BIG_BARS[name]
        slowest, peak = median(u.seconds for u in own), max(u.peak_bytes for u in own)
        in_time, in_memory = limit is None or slowest <= limit, peak <= most
        all_met = all_met and in_time and in_memory
        rows.append((name, *_seconds(own), "" if limit is None else f"<= {limit:.0f} s",
                     "" if limit is None else verdict(in_time), *_memory(own),
                     f"<= {most / MIB:.0f} MiB", verdict(in_memory),
                     f"{files[name] / GIB:.2f} GiB"))  # fmt: skip
    print(table(rows))
    for name, own in found.items():
        print(f"\n{name}: {_own_steps(own[-1])}")
    return all_met


def _seconds(runs: list[Usage]) -> tuple[str]:
    return (f"{median(u.seconds for u in runs):.1f}",)


def _memory(runs: list[Usage]) -> tuple[str]:
    return (f"{median(u.peak_bytes for u in runs) / MIB:.0f} MiB",)


def _own_steps(usage: Usage) -> str:
    steps = usage.report["steps"]
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in steps.items() if seconds >= 0.1)


if __name__ == "__main__":
    main()
