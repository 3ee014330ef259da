"""Seconds and peak memory of opening an artifact, weights copied and linked.

python samples/bench/loading.py

Every load is a process of its own that opens all three graphs as `vtr run` does. The peak counts
the interpreter and ONNX Runtime too; the bar is on it: 1.15 times the bytes of the copied weights.
Peaks include pages of mapped files.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

from measure import (
    MIB,
    Usage,
    checkpoint,
    device,
    export,
    head,
    in_turns,
    parser,
    peak_rss_bytes,
    python,
    rss_bytes,
    table,
    verdict,
    work,
)

BAR = 1.15
CASES = (("decoder-300m", "fp32"), ("llava-1.4b", "fp16"))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options.set_defaults(runs=5)
    args = options.parse_args()
    if args.open is not None:
        print(json.dumps(_open(args.open, args.threads, args.device)))
        return
    all_met = True
    print(head(device(args), f"{args.runs} rounds in turns"))
    for shape, dtype in [("tiny", "fp32")] if args.tiny else CASES:
        with work(args.work) as folder:
            all_met = _case(shape, dtype, folder, args) and all_met
    sys.exit(0 if all_met or args.tiny else 1)


def _open(artifact: Path, threads: int, device: str) -> dict[str, float]:
    """Open all graphs; seconds of that alone, and memory before and after."""
    import onnxruntime  # noqa: F401 - not part of the load

    from vtr_export.runtime.artifact import Artifact

    before, start = rss_bytes(), time.perf_counter()
    loaded = Artifact.load(artifact, threads=threads, device=device)
    seconds, now = time.perf_counter() - start, rss_bytes()
    del loaded
    return {"seconds": seconds, "before": before, "after": now, "peak": peak_rss_bytes()}


def _case(shape: str, dtype: str, folder: Path, args: argparse.Namespace) -> bool:
    model = checkpoint(shape, folder, dtype)
    schedule = folder / "loading.yaml"
    schedule.write_text("version: 1\nprefill:\n  stages: [{before_layer: 2, keep: 50%}]\n")
    artifacts = {}
    for weights in ("copy", "link"):
        artifacts[weights] = folder / f"loading-{shape}-{weights}"
        if not artifacts[weights].is_dir():
            export(model, artifacts[weights], schedule, dtype=dtype, weights=weights)
    bytes_ = sum(file.stat().st_size for file in (artifacts["copy"] / "onnx").glob("*.data"))
    common = ("--threads", args.threads, "--device", args.device)
    calls = {
        name: lambda a=artifact: python("loading.py", "--open", a, *common)
        for name, artifact in artifacts.items()
    }
    found = in_turns(calls, args.runs)
    rows = [("", "seconds", "peak RSS", "of the weights", f"<= {BAR}", "RSS once open",
             "RSS before")]  # fmt: skip
    for name, own in found.items():
        peak = max(usage.peak_bytes for usage in own)
        met = verdict(peak <= BAR * bytes_) if name == "copy" else ""
        rows.append((name, f"{_median(own, 'seconds'):.2f}", f"{peak / MIB:.0f} MiB",
                     f"{peak / bytes_:.3f}", met, f"{_median(own, 'after') / MIB:.0f} MiB",
                     f"{_median(own, 'before') / MIB:.0f} MiB"))  # fmt: skip
    print(f"{shape}, {dtype}: {bytes_ / MIB:.0f} MiB of weights\n\n{table(rows)}\n")
    return max(usage.peak_bytes for usage in found["copy"]) <= BAR * bytes_


def _median(runs: list[Usage], field: str) -> float:
    return median(usage.report[field] for usage in runs)


if __name__ == "__main__":
    main()
