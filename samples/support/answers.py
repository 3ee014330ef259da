"""What an artifact or engine answers, and what its checkpoint answers in transformers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtr_export import Artifact, Schedule
from vtr_export.families import read_facts
from vtr_export.reference import Reference, embed
from vtr_export.runtime.artifact import Request
from vtr_export.verify.gates import cosines, differing, worst_difference
from vtr_export.verify.oracle import DTYPES

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """A question about an image, and what counts as right; nothing where nobody knows."""

    image: Path
    question: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Said:
    """An answer and its prefill: logits [vocab], and the vision tokens left after each cut.

    ``scores`` are what each cut chose by, of those left before it; only the reference tells.
    """

    text: str
    logits: NDArray[np.float32]
    kept: tuple[Ints, ...]
    scores: tuple[NDArray[np.float32], ...] = ()


def read_questions(file: Path, limit: int | None) -> list[Asked]:
    """JSON Lines: ``image`` (relative to the file), ``question``, and ``answers`` if known."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        Asked(file.parent / row["image"], row["question"], tuple(row.get("answers", ())))
        for row in rows[:limit]
    ]


def ours(folder: Path, device: str, asked: Sequence[Asked], tokens: int) -> list[Said]:
    """Through the runtime, on ``device``."""
    loaded = Artifact.load(folder, device=device)
    return [_ours(loaded, each, tokens) for each in asked]


def _ours(loaded: Artifact, asked: Asked, tokens: int) -> Said:
    answer = loaded.generate(asked.image, asked.question, max_new_tokens=tokens)
    prepared = loaded.prepare([Request(asked.question, [asked.image])])
    assert prepared.images is not None, "each question has an image"
    features = loaded.model.encode(prepared.images.feeds).features
    batch = loaded.model.pad([prepared.rows[0].ids])
    step = loaded.model.prefill(loaded.model.decoder.empty(1), batch, features, prepared.seen)
    kept = _survivors(batch.vision_index[0], step.kept, batch.input_ids.shape[1])
    return Said(answer.text.strip(), step.logits[0], kept)


class Theirs:
    """A checkpoint in transformers: as it is, and with the cuts of a schedule."""

    def __init__(self, checkpoint: Path, schedule: Schedule, dtype: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor: Any = AutoProcessor.from_pretrained(checkpoint, local_files_only=True)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint,
            dtype=DTYPES[dtype],
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
        ).to(self.device)
        facts = read_facts(self.model.config.to_dict(), str(checkpoint))
        self.cut = Reference(
            self.model.model.language_model, self.model.lm_head, schedule.resolve(facts)
        )

    @torch.no_grad()
    def answer(self, asked: Asked, tokens: int) -> tuple[Said, str]:
        """With the cuts, and the words of the whole model."""
        inputs = self._inputs(asked)
        ids, mask, pixels = (inputs[n] for n in ("input_ids", "attention_mask", "pixel_values"))
        whole = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        embeds, index = embed(self.model, ids, mask, pixels)
        ends = self.model.generation_config.eos_token_id
        table = self.model.get_input_embeddings()
        said = self.cut.generate(
            table, embeds, mask, index, max_new_tokens=tokens, eos=np.atleast_1d(ends).tolist()
        )
        kept = tuple(_numpy(each) for each in said.prefill.kept)
        survivors = _survivors(_numpy(index)[0], kept, ids.shape[1])
        logits = _numpy(said.logits.float())[0, 0]
        scores = tuple(_numpy(each)[0] for each in said.prefill.scores)
        text = self._text(whole[0, ids.shape[1] :])
        return Said(self._text(said.tokens[0]), logits, survivors, scores), text

    def _inputs(self, asked: Asked) -> Any:
        content = [{"type": "image"}, {"type": "text", "text": asked.question}]
        text = f"{self.processor.image_token}\n{asked.question}"
        if self.processor.chat_template is not None:
            turns = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        image = Image.open(asked.image).convert("RGB")
        inputs = self.processor(images=[image], text=[text], return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs.to(self.device)

    def _text(self, ids: torch.Tensor) -> str:
        return str(self.processor.decode(ids, skip_special_tokens=True)).strip()


def theirs(
    checkpoint: Path, schedule: Schedule, dtype: str, asked: Sequence[Asked], tokens: int
) -> list[tuple[Said, str]]:
    """Of every question; the model is gone again afterwards."""
    model = Theirs(checkpoint, schedule, dtype)
    found = [model.answer(each, tokens) for each in asked]
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def compare(
    asked: Sequence[Asked],
    mine: Sequence[Said],
    other: Sequence[tuple[Said, str]],
    near_tie: float,
) -> dict[str, Any]:
    """Answers counted, logits compared where both kept the same.

    ``near_ties`` counts the prompts where rounding alone, a relative ``near_tie`` of the scores,
    may have swapped what is kept.
    """
    pairs = [(a, b) for a, (b, _) in zip(mine, other, strict=True)]
    same = [(a, b) for a, b in pairs if not any(map(differing, a.kept, b.kept))]
    known = [(a, q) for a, q in zip(mine, asked, strict=True) if q.answers]
    return {
        "questions": len(asked),
        "with_known_answer": len(known),
        "right": sum(a.text in q.answers for a, q in known),
        "alike": sum(a.text == b.text for a, b in pairs),
        "alike_whole": sum(a.text == text for a, (_, text) in zip(mine, other, strict=True)),
        "same_keep_sets": len(same),
        "near_ties": sum(_is_near_tie(a, b, near_tie) for a, b in pairs),
        "cosine": min((float(cosines(a.logits, b.logits)) for a, b in same), default=None),
        "difference": max((worst_difference(a.logits, b.logits) for a, b in same), default=None),
    }


def shown(
    asked: Sequence[Asked], mine: Sequence[Said], other: Sequence[tuple[Said, str]]
) -> list[dict[str, Any]]:
    """Each question and the three answers."""
    return [
        {
            "image": each.image.name,
            "question": each.question,
            "answer": said.text,
            "transformers": cut.text,
            "transformers_whole": whole,
            "known": list(each.answers),
        }
        for each, said, (cut, whole) in zip(asked, mine, other, strict=True)
    ]


def _survivors(vision: Ints, kept: Sequence[Ints], columns: int) -> tuple[Ints, ...]:
    """``kept`` names columns of the stage before each cut; here: numbers of vision tokens."""
    left, found = np.arange(columns), []
    for stage in kept:
        left = left[stage[0]]
        found.append(np.flatnonzero(np.isin(vision, left)))
    return tuple(found)


def _is_near_tie(mine: Said, other: Said, near_tie: float) -> bool:
    """Whether the first cut that differs swapped only scores close to the worst that was kept."""
    before = np.arange(len(other.scores[0])) if other.scores else np.arange(0)
    for ours, kept, scores in zip(mine.kept, other.kept, other.scores, strict=True):
        if differing(ours, kept):
            worst = scores[np.isin(before, kept)].min(initial=np.inf)
            swapped = scores[np.isin(before, np.setxor1d(ours, kept))]
            return bool((np.abs(swapped - worst) <= near_tie * abs(worst)).all())
        before = kept
    return False


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.cpu().numpy()
    return array
