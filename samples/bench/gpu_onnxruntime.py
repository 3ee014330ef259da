"""Prefill, decode and memory of LLaVA-1.5-7B's shape in ONNX Runtime CUDA, with and without cuts.

python samples/bench/gpu_onnxruntime.py

Random fp16 weights, written once and linked by every artifact: 13 GiB of disk. One process opens
one decoder: 576 vision and 64 text tokens, then decode steps. Ideal: the ratio of the FLOPs that
the graphs compute. Memory: what nvidia-smi saw above what was in use before; on a CPU, the
process's peak. The table also goes to samples/bench/gpu_onnxruntime.md.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from decoders import Decoder, Prompt, embedding_table, medians
from measure import (
    GIB,
    HERE,
    PROVIDERS,
    checkpoint,
    device,
    head,
    parser,
    peak_rss_bytes,
    python,
    say,
    table,
    verdict,
    work,
)
from models import SHAPES
from prefill import UNPRUNED, export_all, facts_of, open_decoder, schedules

from vtr_export.cost import ideal_speedup
from vtr_export.families import ModelFacts
from vtr_export.schedule import Schedule

PREFILL_BAR, IDLE_BAR = 0.9, 1.01  # of ideal; of the unpruned prefill
IDLE = "as many cuts, keeping all"
MEMORY = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
REPORT = HERE / "gpu_onnxruntime.md"


def main() -> None:
    args = arguments()
    if args.child is not None:
        print(json.dumps(measure(args, args.child, args.model)))
        return
    check(args.device)
    with work(args.work) as folder:
        model = checkpoint(args.shape, folder, args.dtype)
        facts = facts_of(model)
        plans = plans_of(facts)
        artifacts = export_all(model, folder, plans, args.dtype, "link")
        found = {name: run(args, name, artifact, model) for name, artifact in artifacts.items()}
    assert facts.tokens_per_image is not None
    tokens = f"{facts.tokens_per_image} vision and {args.text} text tokens, {args.steps} steps"
    about = head(where(args), args.shape, args.dtype, f"median of {args.runs}", tokens)
    bars = f"Bars: {PREFILL_BAR} of ideal; keeping all, {IDLE_BAR} times the unpruned prefill."
    text = f"{about}\n{rows(found, plans, facts, args.text)}\n\n{bars}\n"
    print(text)
    if args.report is not None:
        args.report.write_text(f"# LLaVA in ONNX Runtime CUDA\n\n{text}", encoding="utf-8")


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.set_defaults(device="cuda")
    options.add_argument("--shape", choices=SHAPES, default="llava-7b")
    options.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16")
    options.add_argument("--text", type=int, default=64, help="text tokens")
    options.add_argument("--steps", type=int, default=64, help="tokens decoded after each prefill")
    options.add_argument("--report", type=Path, help=f"default: {REPORT.name}, of a GPU's 7 B")
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.tiny:
        args.shape, args.steps = "tiny", 4
    if args.report is None and (args.device, args.shape) == ("cuda", "llava-7b"):
        args.report = REPORT
    return args


def plans_of(facts: ModelFacts) -> dict[str, Schedule]:
    """What is measured, by name; the last tells what cuts cost where they spare nothing."""
    plans = schedules(facts)
    cuts = max((plan.resolve(facts).cuts for plan in plans.values()), key=len)
    stages = ", ".join(f"{{before_layer: {cut.before_layer}, keep: 100%}}" for cut in cuts)
    text = f"version: 1\nprefill:\n  stages: [{stages}]\n"
    return plans | {IDLE: Schedule.parse(text, IDLE)}


def check(place: str) -> None:
    """SystemExit where the GPU cannot be used: before 13 GiB are written."""
    if place == "cpu":
        return
    import onnxruntime

    if PROVIDERS[place] not in onnxruntime.get_available_providers():
        raise SystemExit(f"this onnxruntime has no {PROVIDERS[place]}: vtr doctor")
    if subprocess.run(MEMORY, capture_output=True, check=False).returncode:
        raise SystemExit("nvidia-smi finds no GPU")


def run(args: argparse.Namespace, name: str, artifact: Path, model: Path) -> dict[str, float]:
    """One artifact in a process of its own, whose memory is all its own."""
    say(f"measure {name}")
    return python(
        "gpu_onnxruntime.py", "--child", artifact, "--model", model, "--device", args.device,
        "--threads", args.threads, "--runs", args.runs, "--text", args.text,
        "--steps", args.steps,
    ).report  # fmt: skip


def measure(args: argparse.Namespace, artifact: Path, model: Path) -> dict[str, float]:
    """Medians in seconds, after two rounds of warm-up; peak memory in bytes."""
    tokens = facts_of(model).tokens_per_image
    assert tokens is not None
    prompt = Prompt.draw(embedding_table(model), tokens, args.text, args.steps)
    with peak_memory(args.device) as peak:
        decoder = Decoder(open_decoder(artifact, args.threads, args.device))
        rounds = [decoder.measure(prompt) for _ in range(args.runs + 2)][2:]
    middle = medians(rounds)
    spread = max(t.prefill for t in rounds) / min(t.prefill for t in rounds) - 1
    return {"prefill": middle.prefill, "decode": middle.decode, "spread": spread, "peak": peak[0]}


@contextmanager
def peak_memory(place: str) -> Iterator[list[float]]:
    """One number, there at the end: bytes in use at most, on a GPU above those at the start."""
    peak = [0.0]
    if place == "cpu":
        yield peak
        peak[0] = float(peak_rss_bytes())
        return
    watch = subprocess.Popen([*MEMORY, "-lms", "20"], stdout=subprocess.PIPE, text=True)
    assert watch.stdout is not None
    first = float(watch.stdout.readline())
    try:
        yield peak
        time.sleep(0.1)
    finally:
        watch.terminate()
    seen = [float(line) for line in watch.stdout.read().split()]
    peak[0] = (max([first, *seen]) - first) * (1 << 20)


def where(args: argparse.Namespace) -> str:
    """The GPU and its driver, or the CPU."""
    if args.device == "cpu":
        return device(args)
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "-i", "0"]
    done = subprocess.run(query, capture_output=True, text=True, check=True)
    return f"{done.stdout.strip()}, CUDA execution provider"


def rows(
    found: dict[str, dict[str, float]], plans: dict[str, Schedule], facts: ModelFacts, text: int
) -> str:
    """The table."""
    lines = [("schedule", "vision tokens, mean", "prefill", "spread", "speed-up", "ideal",
              "of ideal", "bar", "decode", "of unpruned", "peak memory")]  # fmt: skip
    whole, tokens = found[UNPRUNED], facts.tokens_per_image or 0
    for name, own in found.items():
        resolved = plans[name].resolve(facts)
        kept = resolved.keep_per_layer(tokens)
        ideal = ideal_speedup(facts, resolved, tokens, text)
        speedup = whole["prefill"] / own["prefill"]
        met = {UNPRUNED: "", IDLE: verdict(own["prefill"] <= IDLE_BAR * whole["prefill"])}.get(
            name, verdict(speedup >= PREFILL_BAR * ideal)
        )
        lines.append((name, f"{sum(kept) / len(kept):.0f}", f"{1e3 * own['prefill']:.1f} ms",
                      f"{own['spread']:.1%}", f"{speedup:.3f}", f"{ideal:.3f}",
                      f"{speedup / ideal:.3f}", met, f"{1 / own['decode']:.1f} tok/s",
                      f"{whole['decode'] / own['decode']:.3f}",
                      f"{own['peak'] / GIB:.2f} GiB"))  # fmt: skip
    return table(lines)


if __name__ == "__main__":
    main()
