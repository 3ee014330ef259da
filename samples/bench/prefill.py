"""Speed-up of pruned prefills over the unpruned export, beside what their FLOPs promise.

python samples/bench/prefill.py

A decoder of 322 M parameters, 576 vision and 64 text tokens, all artifacts in turns in one
process. Ideal: the ratio of the FLOPs that the graphs compute (full n x n attention, the cuts'
scores, the last position's logits). Embeddings are random: what is kept does not change the time.
"""

import gc
import sys
from pathlib import Path

from decoders import Decoder, Prompt, embedding_table, medians
from kernels import by_operator, profile
from measure import (
    checkpoint,
    device,
    export,
    head,
    in_turns,
    parser,
    ratio,
    say,
    table,
    verdict,
    work,
)

from vtr_export.checkpoint import read_config
from vtr_export.cost import ideal_speedup
from vtr_export.families import ModelFacts, read_facts
from vtr_export.manifest import Manifest
from vtr_export.runtime.session import Session, open_session
from vtr_export.schedule import Schedule

UNPRUNED, STEEP_HOLD, STEEP_DECAY, STEEP_FLOOR = "unpruned", 2, 0.8, 16
PREFILL_BAR, DECODE_BAR = 0.97, 0.98


def facts_of(model: Path) -> ModelFacts:
    """What its config says."""
    return read_facts(read_config(model)[0], str(model / "config.json"))


def schedules(facts: ModelFacts) -> dict[str, Schedule]:
    """What is measured, by name."""
    assert facts.tokens_per_image is not None
    return {
        UNPRUNED: Schedule.unpruned(),
        "FastV(K=2, R=50%)": Schedule.fastv(2, "50%"),
        "pyramid(0.5)": Schedule.pyramid("50%", layers=facts.layers, parts=min(4, facts.layers)),
        "steep list": Schedule.from_keeps(steep(facts.layers, facts.tokens_per_image)),
    }


def steep(layers: int, tokens: int) -> list[int]:
    """All tokens in the first layers, then four fifths of the layer before, down to a floor."""
    floor = min(STEEP_FLOOR, tokens)
    return [
        max(floor, round(tokens * STEEP_DECAY ** max(0, layer - STEEP_HOLD + 1)))
        for layer in range(layers)
    ]


def export_all(
    model: Path, folder: Path, plans: dict[str, Schedule], dtype: str, weights: str = "copy"
) -> dict[str, Path]:
    """An artifact of every schedule, made where it is not there yet."""
    made = {}
    for number, (name, schedule) in enumerate(plans.items()):
        out = folder / f"{model.name}-{weights}-{number}"
        if not (out / "manifest.json").is_file():
            say(f"export {name}")
            file = folder / f"schedule-{number}.yaml"
            file.write_text(schedule.dump(), encoding="utf-8")
            export(model, out, file, dtype=dtype, weights=weights)
        made[name] = out
    return made


def open_decoder(artifact: Path, threads: int, device: str) -> Session:
    """The decoder's graph as a session."""
    shards = Manifest.load(artifact).linked_shards()
    return open_session(decoder_file(artifact), threads=threads, device=device, shards=shards)


def decoder_file(artifact: Path) -> Path:
    """The decoder's graph."""
    return artifact / Manifest.load(artifact).graphs.decoder


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--text", type=int, default=64, help="text tokens")
    options.add_argument("--steps", type=int, default=32, help="tokens decoded after each prefill")
    options.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32")
    options.add_argument("--kernels", action="store_true", help="also say where the time goes")
    args = options.parse_args()
    with work(args.work) as folder:
        model = checkpoint("tiny" if args.tiny else "decoder-300m", folder, args.dtype)
        facts = facts_of(model)
        plans = schedules(facts)
        artifacts = export_all(model, folder, plans, args.dtype)
        prompt = Prompt.draw(embedding_table(model), facts.tokens_per_image, args.text, args.steps)
        tokens = f"{prompt.vision} vision and {args.text} text tokens, {args.steps} decode steps"
        print(head(device(args), args.dtype, f"{args.runs} rounds in turns", tokens))
        sides = {
            name: Decoder(open_decoder(artifact, args.threads, args.device))
            for name, artifact in artifacts.items()
        }
        calls = {name: lambda s=side: s.measure(prompt) for name, side in sides.items()}
        timings = in_turns(calls, args.runs)
        met = _print(timings, facts, plans, args.text)
        if args.kernels:
            del sides, calls
            gc.collect()
            for name, artifact in artifacts.items():
                kernels = profile(decoder_file(artifact), prompt, args.threads)
                print(f"\n{name}\n\n{by_operator(kernels)}")
    sys.exit(0 if met or args.tiny else 1)


def _print(timings, facts, plans, text) -> bool:
    """The table; True when every bar is met."""
    rows = [("schedule", "vision tokens, mean", "prefill", "speed-up", "ideal", "of ideal",
             f">= {PREFILL_BAR}", "decode", "of unpruned", f">= {DECODE_BAR}")]  # fmt: skip
    whole, all_met = timings[UNPRUNED], True
    for name, own in timings.items():
        resolved, middle = plans[name].resolve(facts), medians(own)
        kept = resolved.keep_per_layer(facts.tokens_per_image)
        ideal = ideal_speedup(facts, resolved, facts.tokens_per_image, text)
        speedup = ratio([t.prefill for t in whole], [t.prefill for t in own])
        decode = ratio([t.decode for t in whole], [t.decode for t in own])
        met = speedup >= PREFILL_BAR * ideal, decode >= DECODE_BAR
        all_met = all_met and all(met)
        bars = [verdict(one) if name != UNPRUNED else "" for one in met]
        rows.append((name, f"{sum(kept) / len(kept):.0f}", f"{1e3 * middle.prefill:.0f} ms",
                     f"{speedup:.3f}", f"{ideal:.3f}", f"{speedup / ideal:.3f}", bars[0],
                     f"{1 / middle.decode:.2f} tok/s", f"{decode:.3f}", bars[1]))  # fmt: skip
    print(table(rows))
    return all_met


if __name__ == "__main__":
    main()
