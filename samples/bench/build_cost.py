"""Seconds, plan bytes and peak memory of `vtr build`, with one GPU to build for and with three.

python samples/bench/build_cost.py

TensorRT-RTX builds without a GPU. A plan holds its weights; the bar is on the decoder of 1.1 B
parameters: the process that builds it takes at most 3.5 times the bytes of its plan.
"""

import argparse
import sys
from pathlib import Path

from measure import MIB, checkpoint, export, head, parser, table, verdict, vtr, work

BAR = 3.5
SMS = ("86", "86,89,120")


def main() -> None:
    args = parser(__doc__).parse_args()
    print(head("TensorRT-RTX, without a GPU", "1 run"))
    with work(args.work) as folder:
        met = _case("tiny" if args.tiny else "llava-1.4b", folder, args)
    sys.exit(0 if met or args.tiny else 1)


def _case(shape: str, folder: Path, args: argparse.Namespace) -> bool:
    model, artifact = checkpoint(shape, folder, "fp16"), folder / f"build-{shape}"
    schedule = folder / "build.yaml"
    schedule.write_text("version: 1\nprefill:\n  stages: [{before_layer: 2, keep: 50%}]\n")
    if not artifact.is_dir():
        export(model, artifact, schedule, dtype="fp16")
    rows = [("SM", "part", "weights", "plan", "seconds", "peak RSS", "of the plan", f"<= {BAR}")]
    all_met = True
    for sms in SMS:
        out = folder / f"engine-{shape}-{sms}"
        usage = vtr("build", artifact, "-o", out, "--sm", sms, "--unverified", "--json")
        for engine in usage.report["engines"]:
            ratio = engine["peak_rss_bytes"] / engine["bytes"]
            met = engine["component"] != "decoder" or ratio <= BAR
            all_met = all_met and met
            rows.append(_row(sms, engine, ratio, verdict(met)))
        again = vtr("build", artifact, "-o", out, "--sm", sms, "--unverified", "--json")
        rows.append((sms, "up to date", "", "", f"{again.seconds:.1f}", "", "", ""))
        assert again.report["up_to_date"]
    print(f"{shape}, fp16\n\n{table(rows)}\n")
    return all_met


def _row(sms: str, engine: dict[str, object], ratio: float, met: str) -> tuple[str, ...]:
    sizes = (engine[name] for name in ("weights_bytes", "bytes"))
    weights, plan = (f"{int(str(size)) / MIB:.0f} MiB" for size in sizes)
    peak = f"{int(str(engine['peak_rss_bytes'])) / MIB:.0f} MiB"
    bar = met if engine["component"] == "decoder" else ""
    part = str(engine["component"]).replace("_", " ")
    return sms, part, weights, plan, f"{engine['seconds']:.1f}", peak, f"{ratio:.2f}", bar


if __name__ == "__main__":
    main()
