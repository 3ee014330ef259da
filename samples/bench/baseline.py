"""Our unpruned decoder beside those of mobius-onnx and transformers' exporter.

python samples/bench/baseline.py --mobius-python VENV/bin/python

Same weights, dtype, threads and ONNX Runtime; prefill of 640 tokens and decode steps, all graphs
in turns in one process, and their logits compared. The other exporters give logits of every
position; `last` is the same graph given a Gather before the last matrix product, so that the
decoder alone is compared. The bar is taken against the best of all. transformers has a graph for
each phase. mobius-onnx is optional (pip install mobius-onnx, best in a venv of its own).
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from decoders import Decoder, Prompt, Timing, embedding_table, medians
from measure import (
    checkpoint,
    device,
    head,
    in_turns,
    parser,
    python,
    ratio,
    say,
    table,
    verdict,
    work,
)
from prefill import UNPRUNED, decoder_file, export_all

from vtr_export.runtime.session import open_session
from vtr_export.schedule import Schedule

OURS, BAR = "vtr-export", 1.05
SAME_LOGITS = {"fp32": 1e-3, "fp16": 5e-2}  # relative to the largest


@dataclass(frozen=True)
class Peer:
    """A graph of another exporter; ``extra`` are the arguments of peers.py."""

    program: str
    extra: tuple[str, ...]
    prefill: str
    decode: str | None = None


def peers(provider: str) -> dict[str, Peer]:
    """What is compared, by name."""
    hf, mobius = "transformers-decoder", "mobius-decoder"
    fused, two = ("--provider", provider), ("prefill.onnx", "decode.onnx")
    return {
        "transformers": Peer(hf, ("--last",), *two),
        "transformers, fused": Peer(hf, fused, *two),
        "transformers, fused, last": Peer(hf, (*fused, "--last"), *two),
        "mobius, last": Peer(mobius, ("--last",), "model.onnx"),
        "mobius, fused": Peer(mobius, fused, "model.onnx"),
        "mobius, fused, last": Peer(mobius, (*fused, "--last"), "model.onnx"),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--mobius-python", help="an interpreter that has mobius-onnx")
    options.add_argument("--tokens", type=int, default=640)
    options.add_argument("--steps", type=int, default=32, help="tokens decoded after each prefill")
    options.add_argument("--dtype", choices=SAME_LOGITS, default="fp32")
    options.add_argument("--only", nargs="*", help="peers by name; all others are left out")
    args = options.parse_args()
    with work(args.work) as folder:
        model = checkpoint("tiny" if args.tiny else "decoder-300m", folder, args.dtype)
        ours = export_all(model, folder, {UNPRUNED: Schedule.unpruned()}, args.dtype)[UNPRUNED]
        sides = {OURS: Decoder(_open(decoder_file(ours), args))}
        for name, peer in peers(args.device).items():
            if args.only is None or name in args.only:
                sides |= _peer(name, peer, model, folder, args)
        prompt = Prompt.draw(embedding_table(model), 0, args.tokens, args.steps)
        same = _compare(sides, prompt)
        calls = {name: lambda s=side: s.measure(prompt) for name, side in sides.items()}
        found = in_turns(calls, args.runs)
    tokens = f"{args.tokens} tokens, {args.steps} decode steps"
    print(head(device(args), args.dtype, f"{args.runs} rounds in turns", tokens))
    met = _print(found, same)
    wrong = [name for name, error in same.items() if error > SAME_LOGITS[args.dtype]]
    if wrong:
        raise SystemExit(f"other logits than ours: {', '.join(wrong)}")
    sys.exit(0 if met or args.tiny else 1)


def _peer(
    name: str, peer: Peer, model: Path, folder: Path, args: argparse.Namespace
) -> dict[str, Decoder]:
    """The peer's graphs, opened; nothing where mobius-onnx is not to be had."""
    interpreter = args.mobius_python if "mobius" in peer.program else sys.executable
    if interpreter is None:
        say(f"{name}: left out, give --mobius-python")
        return {}
    out = folder / f"{model.name}-{name.replace(', ', '-')}"
    if not out.is_dir():
        say(f"export by {name}")
        python("peers.py", peer.program, model, out, "--dtype", args.dtype, *peer.extra,
               interpreter=interpreter)  # fmt: skip
    decode = None if peer.decode is None else _open(out / peer.decode, args)
    return {name: Decoder(_open(out / peer.prefill, args), decode)}


def _open(file: Path, args: argparse.Namespace):
    return open_session(file, threads=args.threads, device=args.device)


def _compare(sides: dict[str, Decoder], prompt: Prompt) -> dict[str, float]:
    """Largest difference of each one's logits from ours, relative to our largest."""
    ours = sides[OURS].logits(prompt)
    return {
        name: float(np.abs(side.logits(prompt) - ours).max() / np.abs(ours).max())
        for name, side in sides.items()
    }


def _print(found: dict[str, list[Timing]], same: dict[str, float]) -> bool:
    """The table; True when both bars are met."""
    rows = [("", "prefill", "ours by it", "decode step", "ours by it", "logits differ by")]
    ours, worst = found[OURS], [0.0, 0.0]
    for name, own in found.items():
        middle = medians(own)
        ratios = [
            ratio([getattr(t, phase) for t in ours], [getattr(t, phase) for t in own])
            for phase in ("prefill", "decode")
        ]
        if name != OURS:
            worst = [max(pair) for pair in zip(worst, ratios, strict=True)]
        times = f"{1e3 * middle.prefill:.0f} ms", f"{1e3 * middle.decode:.2f} ms"
        cells = (f"{value:.3f}" for value in ratios)
        prefill, decode = zip(times, cells, strict=True)
        rows.append((name, *prefill, *decode, f"{same[name]:.1e}"))
    print(table(rows))
    for phase, value in zip(("prefill", "decode"), worst, strict=True):
        print(f"{phase}: {value:.3f} of the best other's time, bar {BAR}: {verdict(value <= BAR)}")
    return max(worst) <= BAR


if __name__ == "__main__":
    main()
