"""Does an artifact answer as its checkpoint does with the same cuts? Every question, both ways."""

import argparse
import json
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch
from evaluate import held_out
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vtr_export import Artifact, Schedule
from vtr_export.families import read_facts
from vtr_export.reference import Reference, embed
from vtr_export.runtime.artifact import Request
from vtr_export.runtime.sampling import Options

HERE = Path(__file__).parent
BATCH, TOKENS, TIE = 64, 4, 1e-6


@dataclass(frozen=True)
class Asked:
    """A question with its image, and the right answer."""

    image: Image.Image
    question: str
    answer: str


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path, help="folder that vtr export published")
    parser.add_argument("--model", type=Path, default=HERE / "model", help="its checkpoint")
    parser.add_argument("--more", type=int, default=1024, help="questions beside the shipped ones")
    return parser.parse_args()


def shipped() -> list[Asked]:
    """The questions of ``questions.jsonl``."""
    lines = (HERE / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        Asked(Image.open(HERE / row["image"]), row["question"], row["answers"][0]) for row in rows
    ]


def more(number: int) -> list[Asked]:
    """The first ``number`` questions that accuracy is measured on."""
    drawn = (
        Asked(image, question.text, question.answer)
        for step in count()
        for image, question in zip(*held_out(step), strict=True)
    )
    return list(islice(drawn, number))


class Oracle:
    """The checkpoint in transformers, its decoder cut by the reference."""

    def __init__(self, folder: Path, schedule: Schedule) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        facts = read_facts(self.model.config.to_dict(), str(folder))
        self.decoder = Reference(
            self.model.model.language_model, self.model.lm_head, schedule.resolve(facts)
        )

    @torch.no_grad()
    def answers(self, asked: list[Asked]) -> tuple[list[str], list[list[float]]]:
        """What is said, and the margin at every cut on the way."""
        inputs = self.processor(
            images=[each.image for each in asked],
            text=[self._prompt(each.question) for each in asked],
            padding=True,
            return_tensors="pt",
        )
        mask = inputs["attention_mask"]
        embeds, index = embed(self.model, inputs["input_ids"], mask, inputs["pixel_values"])
        said = self.decoder.generate(
            self.model.get_input_embeddings(),
            embeds,
            mask,
            index,
            max_new_tokens=TOKENS,
            eos=[self.processor.tokenizer.eos_token_id],
        )
        texts = self.processor.batch_decode(said.tokens, skip_special_tokens=True)
        margins = torch.stack(said.prefill.margins, 1).tolist()
        return [text.strip() for text in texts], margins

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(turns, add_generation_prompt=True))


def main() -> None:
    args = arguments()
    artifact = Artifact.load(args.artifact)
    oracle = Oracle(args.model, Schedule.load(args.artifact / "schedule.yaml"))
    asked = shipped() + more(args.more)
    unlike, ties, cuts, right = list[str](), list[str](), 0, 0
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        requests = [Request(each.question, [each.image]) for each in batch]
        ours = artifact.generate_batch(requests, Options(TOKENS))
        theirs, margins = oracle.answers(batch)
        for each, mine, expected, at in zip(batch, ours, theirs, margins, strict=True):
            said, cuts = mine.text.strip(), cuts + len(at)
            line = f"{each.question} {said!r}, the reference {expected!r}"
            unlike += [f"unlike: {line}"] if said != expected else []
            ties += [f"near tie: {line}, margin {margin:.1e}" for margin in at if margin < TIE]
            right += said == each.answer
    print(*unlike, *ties, sep="\n", end="\n" if unlike or ties else "")
    print(f"{len(asked)} questions, {len(asked) - len(unlike)} answered alike")
    print(f"{cuts} rows at a cut, {len(ties)} with a margin below {TIE:g}")
    print(f"accuracy {right / len(asked):.2%}")
    raise SystemExit(bool(unlike) or len(ties) > cuts / 100)


if __name__ == "__main__":
    main()
