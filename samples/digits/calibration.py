"""Write a folder of questions to search on, or to judge a schedule by: never the same scenes."""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from PIL import Image
from questions import KINDS, Question, ask
from scenes import Array, make

CALIBRATION, EVALUATION = 3, 4
TAKEN = {0: "train.py", 1: "evaluate.py", 2: "pick_questions.py"}
SCENES = 256  # drawn at a time


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--evaluation",
        action="store_true",
        help="other scenes with one question each, which are independent: narrow intervals",
    )
    parser.add_argument("--questions", type=int, help="default: 2048, for evaluation 4096")
    parser.add_argument(
        "--seed", type=int, help=f"default: {CALIBRATION}, for evaluation {EVALUATION}"
    )
    args = parser.parse_args()
    args.questions = (
        (4096 if args.evaluation else 2048) if args.questions is None else args.questions
    )
    own, other = (EVALUATION, CALIBRATION) if args.evaluation else (CALIBRATION, EVALUATION)
    args.seed = own if args.seed is None else args.seed
    taken = TAKEN | {other: f"calibration.py {'' if args.evaluation else '--evaluation'}".strip()}
    if args.seed in taken or args.seed < 0:
        parser.error(f"--seed {args.seed} is {taken.get(args.seed, 'negative')}'s: take another")
    if args.questions < 1:
        parser.error(f"--questions {args.questions}: ask at least one")
    return args


def held_out(seed: int, each: int) -> Iterator[tuple[str, Array, Question]]:
    """Held-out scenes by name with ``each`` questions, every kind equally often."""
    step = 0
    while True:
        scenes = make("held_out", seed, step, SCENES)
        for row, asked in enumerate(ask(scenes, seed, step)):
            scene = step * SCENES + row
            for offset in range(each):
                question = asked[(scene * each + offset) % len(KINDS)]
                yield f"images/{scene:05}.png", scenes.images[row], question
        step += 1


def write(out: Path, questions: int, seed: int, each: int) -> None:
    """Images first: the file of questions is whole or not there."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = dict[str, list[str]]()
    for name, pixels, question in islice(held_out(seed, each), questions):
        if name not in rows:
            Image.fromarray(pixels).save(out / name, compress_level=1)
        row = {"image": name, "question": question.text, "answers": [question.answer]}
        rows.setdefault(name, []).append(json.dumps(row | {"kind": question.kind}))
    lines = [line for asked in rows.values() for line in asked]
    beside = out / "questions.tmp"
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    beside.replace(out / "questions.jsonl")
    print(f"{len(lines)} questions about {len(rows)} images in {out}, seed {seed}")


def main() -> None:
    args = arguments()
    write(args.out, args.questions, args.seed, 1 if args.evaluation else len(KINDS))


if __name__ == "__main__":
    main()
