"""What pruning costs the digits sample in accuracy, and what it saves.

python samples/bench/sample_table.py

Every schedule is exported, answers the same 2,000 held-out questions in ONNX Runtime (batches, the
runtime's own preprocessing and chat template), and is timed in turns with the others, one prompt
at a time. FLOPs count what the graph of the decoder's prefill computes.
"""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from decoders import Decoder, Prompt, medians
from measure import HERE, device, head, in_turns, parser, ratio, say, table, work
from prefill import export_all, facts_of, open_decoder, steep

from vtr_export.cost import prefill_cost
from vtr_export.families import ModelFacts
from vtr_export.runtime.artifact import Artifact, Request
from vtr_export.runtime.sampling import Options
from vtr_export.schedule import Schedule

SAMPLE = HERE.parent / "digits"
UNPRUNED, SCENES, BATCH = "unpruned", 50, 60
SEED = 1  # the sample's own evaluation begins with the same scenes
TEXT, STEPS = 16, 16


def schedules(facts: ModelFacts) -> dict[str, Schedule]:
    """What is compared, by name."""
    layers, tokens = facts.layers, facts.tokens_per_image
    assert tokens is not None
    return {
        UNPRUNED: Schedule.unpruned(),
        "FastV(K=2, R=50%)": Schedule.fastv(2, "50%"),
        "FastV(K=2, R=75%)": Schedule.fastv(2, "75%"),
        "FastV(K=3, R=50%)": Schedule.fastv(3, "50%"),
        "FastV(K=3, R=75%)": Schedule.fastv(3, "75%"),
        "pyramid(0.5)": Schedule.pyramid("50%", layers=layers, parts=min(4, layers)),
        "steep list": Schedule.from_keeps(steep(layers, tokens)),
        f"VTW(K={layers // 2})": Schedule.vtw(layers // 2),
        f"VTW(K={layers - 2})": Schedule.vtw(layers - 2),
        "digits/gsearch.yaml": Schedule.load(SAMPLE / "gsearch.yaml"),
        "digits/psigmoid.yaml": Schedule.load(SAMPLE / "psigmoid.yaml"),
    }


def asked() -> Iterator[tuple[Request, str]]:
    """Held-out questions, each alone with its scene, and their answers."""
    sys.path.insert(0, str(SAMPLE))
    from PIL import Image
    from questions import ask
    from scenes import make

    step = 0
    while True:
        scenes = make("held_out", SEED, step, SCENES)
        pairs = zip(scenes.images, ask(scenes, SEED, step), strict=True)
        for picture, questions in pairs:
            for question in questions:
                yield Request(question.text, [Image.fromarray(picture)]), question.answer
        step += 1


def accuracy(artifact: Artifact, pairs: list[tuple[Request, str]]) -> float:
    """Share of questions whose whole answer is right."""
    right = 0
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        answers = artifact.generate_batch([ask for ask, _ in batch], Options(max_new_tokens=4))
        right += sum(
            answer.text.strip() == wanted
            for answer, (_, wanted) in zip(answers, batch, strict=True)
        )
    return right / len(pairs)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, default=SAMPLE / "model")
    options.add_argument("--questions", type=int, default=2000)
    options.set_defaults(runs=21)
    args = options.parse_args()
    facts = facts_of(args.model)
    plans = schedules(facts)
    if args.tiny:
        plans, args.questions = dict(islice(plans.items(), 2)), 12
    pairs = list(islice(asked(), args.questions))
    shares = {}
    with work(args.work) as folder:
        artifacts = export_all(args.model, folder, plans, "fp32")
        for name, folder_ in artifacts.items():
            loaded = Artifact.load(folder_, threads=args.threads, device=args.device)
            shares[name] = accuracy(loaded, pairs)
            say(f"{name}: {shares[name]:.2%}")
        prompt = _prompt(facts)
        sides = {
            name: Decoder(open_decoder(artifact, args.threads, args.device))
            for name, artifact in artifacts.items()
        }
        calls = {name: lambda s=side: s.measure(prompt) for name, side in sides.items()}
        found = in_turns(calls, args.runs)
    tokens = f"{facts.tokens_per_image} vision and {TEXT} text tokens"
    rounds = f"{args.runs} rounds in turns"
    print(head(device(args), "fp32", f"{len(pairs)} questions", rounds, tokens))
    print(table(_rows(facts, plans, shares, found)))


def _prompt(facts: ModelFacts) -> Prompt:
    import numpy as np

    values = np.random.default_rng(0).standard_normal((100, facts.hidden), np.float32)
    assert facts.tokens_per_image is not None
    return Prompt.draw(values, facts.tokens_per_image, TEXT, STEPS)


def _rows(facts, plans, shares, found) -> list[tuple[str, ...]]:
    rows = [("schedule", "vision tokens by layer", "accuracy", "prefill MFLOPs", "of unpruned",
             "prefill", "speed-up", "decode step", "of unpruned")]  # fmt: skip
    tokens = facts.tokens_per_image
    flops = {
        name: prefill_cost(facts, plan.resolve(facts), tokens, TEXT, "exact")
        for name, plan in plans.items()
    }
    whole = found[UNPRUNED]
    for name, own in found.items():
        middle = medians(own)
        kept = plans[name].resolve(facts).keep_per_layer(tokens)
        rows.append((
            name, " ".join(map(str, kept)), f"{shares[name]:.2%}", f"{flops[name] / 1e6:.0f}",
            f"{flops[name] / flops[UNPRUNED]:.3f}", f"{1e3 * middle.prefill:.2f} ms",
            f"{ratio([t.prefill for t in whole], [t.prefill for t in own]):.2f}",
            f"{1e3 * middle.decode:.2f} ms",
            f"{ratio([t.decode for t in own], [t.decode for t in whole]):.3f}",
        ))  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
