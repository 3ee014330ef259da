"""Accuracy on held-out questions, each asked alone through the shipped template and processor."""

import argparse
import json
from collections import defaultdict
from itertools import count
from pathlib import Path

import torch
from PIL import Image
from questions import KINDS, Question, ask
from scenes import make
from transformers import AutoProcessor, LlavaForConditionalGeneration

HERE = Path(__file__).parent
SEED, BATCH = 1, 100


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--each", type=int, default=2000, help="questions of each kind")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


class Answerer:
    """A checkpoint folder that answers as its users would have it answer."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def answers(self, images: list[Image.Image], questions: list[str]) -> list[str]:
        """What the model generates for each image and its question, greedily."""
        prompts = [self.prompt(question) for question in questions]
        inputs = self.processor(images=images, text=prompts, padding=True, return_tensors="pt")
        ids = self.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def prompt(self, question: str) -> str:
        """The question in the shipped chat template."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(turns, add_generation_prompt=True))


def held_out(step: int) -> tuple[list[Image.Image], list[Question]]:
    """One held-out question of each kind about each of ``BATCH`` new scenes."""
    scenes = make("held_out", SEED, step, BATCH)
    asked = ask(scenes, SEED, step)
    pictures = [Image.fromarray(image) for image in scenes.images]
    pairs = [(picture, q) for picture, row in zip(pictures, asked, strict=True) for q in row]
    return [picture for picture, _ in pairs], [question for _, question in pairs]


def measure(folder: Path, each: int) -> dict[str, float]:
    """Share of right answers by kind, and over all."""
    answerer, right, total = Answerer(folder), defaultdict[str, int](int), 0
    for step in count():
        if total >= each:
            break
        images, questions = held_out(step)
        given = answerer.answers(images, [question.text for question in questions])
        for question, answer in zip(questions, given, strict=True):
            right[question.kind] += answer == question.answer
        total += BATCH
    shares = {kind: right[kind] / total for kind in KINDS}
    return shares | {"all": sum(right.values()) / (total * len(KINDS)), "questions_each": total}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    found = measure(args.model, args.each)
    for name, value in found.items():
        print(f"{name:16}{value:>8.4g}" if name == "questions_each" else f"{name:16}{value:>8.2%}")
    print(json.dumps(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
