"""Calibration questions as a model takes them, and its answers as a metric takes them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from vtr_export.errors import InputError
from vtr_export.runtime.images import ByPrompt, ImageInputs, Seen
from vtr_export.runtime.processor import Form, Processor
from vtr_export.search.evaluator import Floats
from vtr_export.search.questions.calibration import Question
from vtr_export.search.questions.metrics import Metric

BLOCK, SHARD = 256, 64  # questions


def blocks_of(questions: Sequence[Question]) -> tuple[tuple[Question, ...], ...]:
    """The questions in order, ``BLOCK`` at a time."""
    starts = range(0, len(questions), BLOCK)
    return tuple(tuple(questions[start : start + BLOCK]) for start in starts)


class Prompts:
    """A checkpoint's (or an artifact's) chat template, tokenizer and image processor."""

    def __init__(self, folder: str | Path) -> None:
        self.processor = Processor(folder)
        self._seen: dict[Path, Seen] = {}

    def image(self, file: Path, read: str = "") -> ImageInputs:
        """What the vision encoder is fed for one image, alone in its prompt, and for ``read``."""
        return self.processor.reading(self.processor.image_inputs([file]), [read])

    def read(self, question: Question) -> str:
        """What an image's features depend on beside the image; empty where they do not."""
        return "" if self.processor.reader is None else self._text(question)[0]

    def seen(self, file: Path) -> Seen:
        """How many tokens an image becomes; it is read only where that depends on the image."""
        if file not in self._seen:
            tokens = self.processor.facts.tokens_per_image
            self._seen[file] = Seen(tokens) if tokens is not None else self.image(file).seen[0]
        return self._seen[file]

    def ids(self, question: Question) -> tuple[int, ...]:
        """The question behind its images, in the chat template unless it places them itself."""
        processor = self.processor
        if len(question.images) > 1 and isinstance(processor.images, ByPrompt):
            raise InputError(
                "this model prepares several images of a prompt otherwise than one",
                where=question.where,
                hint="ask about one image a question",
            )
        images = [self.seen(file) for file in question.images]
        text, form = self._text(question)
        return tuple(processor.token_ids(text, images, form))

    def _text(self, question: Question) -> tuple[str, Form]:
        """A prompt, and how to encode it."""
        processor, text, images = self.processor, question.text, len(question.images)
        if processor.is_written_out(text):
            return processor.with_places(text, images), "plain"
        return processor.render(processor.messages(text, images)), "chat"

    def text(self, tokens: Sequence[int]) -> str:
        """An answer's text, without what ended it."""
        return self.processor.tokenizer.decode(list(tokens)).strip()


class Draft(Protocol):
    """What the unpruned model answered to one question."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """With the end token, if one ended it."""
        ...

    @property
    def metric(self) -> float:
        """The answer's."""
        ...


def metrics_by_drafts(
    metric: Metric,
    questions: Sequence[Question],
    drafts: Sequence[Draft],
    said: Sequence[Sequence[int]],
    kl: Floats,
    answer: Callable[[Sequence[int]], Sequence[str]],
) -> Floats:
    """Each question's metric under a candidate that was fed the drafts.

    ``said``: its best token at every place of each draft. Where all agree, the draft is what it
    answers; ``answer`` gives the texts of the rows where they do not, and is not asked without one.
    """
    agreed = [agreed_share(draft.tokens, row) for draft, row in zip(drafts, said, strict=True)]
    if metric.text is None:
        rows = zip(questions, agreed, kl.tolist(), strict=True)
        return np.array([metric_of(metric, question, "", *row) for question, *row in rows])
    metrics = np.array([draft.metric for draft in drafts])
    unlike = [row for row, share in enumerate(agreed) if share < 1]
    for row, text in zip(unlike, answer(unlike) if unlike else (), strict=True):
        metrics[row] = metric.text(text, questions[row])
    return metrics


def metric_of(metric: Metric, question: Question, text: str, agreed: float, kl: float) -> float:
    """One question's metric.

    ``agreed``: share of the draft's tokens before the first that differs; ``kl`` in nats.
    """
    if metric.text is not None:
        return metric.text(text, question)
    return agreed if metric.name == "agreement" else -kl


def agreed_share(draft: Sequence[int], said: Sequence[int]) -> float:
    """Share of the draft's tokens before the first that differs."""
    for place, (mine, theirs) in enumerate(zip(draft, said, strict=False)):
        if mine != theirs:
            return place / len(draft)
    return min(len(said), len(draft)) / max(len(draft), 1)


def divergence(unpruned: Floats, pruned: Floats) -> float:
    """KL(unpruned ‖ pruned) in nats of log-probabilities ``[tokens, vocab]``, mean over tokens."""
    terms = np.exp(unpruned) * (unpruned - pruned)
    return max(0.0, float(terms.sum(-1).mean()))
