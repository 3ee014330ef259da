"""Peak memory of a long prefill, and proof that no value but attention's own is n x n.

python samples/bench/memory.py

Five images: 2,880 vision tokens and 64 of text. The peak is that of a process that opens the
decoder and prefills once. Every kernel's outputs are then looked up in ONNX Runtime's profile: a
value with two axes as long as a stage's sequence must be the boolean mask that attention reads.
What ONNX Runtime's own attention allocates inside is its business, and in the peak.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from measure import (
    MIB,
    checkpoint,
    device,
    head,
    parser,
    peak_rss_bytes,
    python,
    rss_bytes,
    table,
    verdict,
    work,
)

from vtr_export.manifest import Manifest
from vtr_export.plan import plan
from vtr_export.schedule import Schedule

MASK = "bool"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=5)
    options.add_argument("--text", type=int, default=64)
    options.add_argument("--prefill", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.prefill is not None:
        print(json.dumps(_prefill(*args.prefill, args)))
        return
    from prefill import export_all, facts_of, schedules

    with work(args.work) as folder:
        model = checkpoint("tiny" if args.tiny else "decoder-300m", folder, "fp32")
        facts = facts_of(model)
        artifacts = export_all(model, folder, schedules(facts), "fp32")
        options = ("--images", args.images, "--text", args.text, "--threads", args.threads)
        found = {}
        for name, artifact in artifacts.items():
            found[name] = python("memory.py", *options, "--prefill", artifact, model).report
        weights = sum(file.stat().st_size for file in (artifact / "onnx").glob("decoder*.data"))
    tokens = f"{args.images * facts.tokens_per_image} vision and {args.text} text tokens"
    print(head(device(args), "fp32", tokens, f"{weights / MIB:.0f} MiB of decoder weights"))
    rows = [("schedule", "open", "peak", "above it", "planned peak", "n x n masks", "other n x n",
             "")]  # fmt: skip
    for name, one in found.items():
        rows.append((name, *(f"{one[field] / MIB:.0f} MiB" for field in ("open", "peak")),
                     f"{(one['peak'] - one['open']) / MIB:.0f} MiB",
                     f"{one['planned'] / MIB:.0f} MiB", f"{one['masks'] / MIB:.1f} MiB",
                     ", ".join(one["square"]) or "none", verdict(not one["square"])))  # fmt: skip
    print(table(rows))
    sys.exit(1 if any(one["square"] for one in found.values()) else 0)


def _prefill(artifact: Path, model: Path, args: argparse.Namespace) -> dict:
    """Memory of one prefill in this process, then the values of another."""
    from decoders import Decoder, Prompt, embedding_table
    from kernels import profile
    from prefill import decoder_file, facts_of, open_decoder

    manifest = Manifest.load(artifact)
    facts = facts_of(model)
    schedule = Schedule.parse(manifest.schedule.text)
    vision = args.images * facts.tokens_per_image
    prompt = Prompt.draw(embedding_table(model), vision, args.text, 1)
    decoder = Decoder(open_decoder(artifact, args.threads, "cpu"))
    opened = rss_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of opening
    decoder.logits(prompt)
    peak = peak_rss_bytes()
    del decoder
    kept = schedule.resolve(facts).keep_per_layer(vision)
    lengths = {*kept, *(tokens + args.text for tokens in kept)} - {0}
    squares = list(_squares(profile(decoder_file(artifact), prompt, args.threads), lengths))
    planned = plan(schedule, facts, text_tokens=args.text, images=args.images, new_tokens=0,
                   weights=manifest.dtype)  # fmt: skip
    return {
        "open": opened,
        "peak": peak,
        "planned": planned.peak_bytes,
        "masks": sum(math.prod(shape) for dtype, shape, _ in squares if dtype == MASK),
        "square": [f"{op} {dtype}{list(s)}" for dtype, s, op in squares if dtype != MASK],
    }


def _squares(kernels, lengths: set[int]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Values with two axes as long as some stage's sequence or vision tokens."""
    long = {length for length in lengths if length > 64}
    for kernel in kernels:
        for dtype, shape in kernel.outputs:
            if sum(size in long for size in shape) > 1:
                yield dtype, shape, kernel.op


if __name__ == "__main__":
    main()
