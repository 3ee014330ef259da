"""Write ``images/`` and ``questions.jsonl``: 64 held-out scenes with two questions each."""

import json
from pathlib import Path

from PIL import Image
from questions import KINDS, ask
from scenes import make

HERE = Path(__file__).parent
SEED, SCENES = 2, 64


def main() -> None:
    scenes = make("held_out", SEED, 0, SCENES)
    asked = ask(scenes, SEED, 0)
    (HERE / "images").mkdir(exist_ok=True)
    lines = []
    for number, (image, questions) in enumerate(zip(scenes.images, asked, strict=True)):
        name = f"images/{number:02}.png"
        Image.fromarray(image).save(HERE / name, optimize=True)
        for offset in (0, 3):
            question = questions[(number + offset) % len(KINDS)]
            row = {"image": name, "question": question.text, "answers": [question.answer]}
            lines.append(json.dumps(row | {"kind": question.kind}))
    (HERE / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
