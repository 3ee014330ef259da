"""Decoder FLOPs of evaluations: those spent, and those a naive search would spend."""

from collections.abc import Sequence
from dataclasses import dataclass

from vtr_export.cost import Rows, get_convention
from vtr_export.families import ModelFacts
from vtr_export.search.candidate import Candidate
from vtr_export.search.evaluator import Shard
from vtr_export.search.evaluators.prompts import Prompts
from vtr_export.search.questions.calibration import Question


@dataclass(frozen=True)
class Width:
    """A padded batch: ``rows`` calls of ``text + vision`` columns, a draft's among the text."""

    rows: int
    text: int
    vision: int


def call_flops(
    facts: ModelFacts, candidate: Candidate, width: Width, first: int, last: int, logits: int
) -> int:
    """FLOPs from before layer ``first`` to before ``last``, with ``logits`` rows of the head.

    What ranks tokens at ``first`` was computed before; what ranks them at ``last`` is counted.
    """
    layer = get_convention("exact").layer
    tokens = [width.vision * keep // candidate.parts for keep in candidate.keeps]
    total = 0
    for index in range(first, last):
        n = tokens[index] + width.text
        total += layer(facts, Rows(n, n))
        is_asked = index + 1 < facts.layers and (
            index + 1 == last or tokens[index + 1] < tokens[index]
        )
        total += _score_flops(facts, candidate, n, width.text) if is_asked else 0
    return width.rows * (total + 2 * logits * facts.hidden * facts.vocab)


def _score_flops(facts: ModelFacts, candidate: Candidate, columns: int, text: int) -> int:
    """One row's score: asking rows meet all keys; the next layer's are projected for it."""
    q, kv = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    asking = text if candidate.score.query == "text" else 1
    projected = columns * facts.hidden * (q + 2 * kv) if candidate.score.source == "next" else 0
    return 2 * (asking * columns * q + projected)


def step_flops(facts: ModelFacts, candidate: Candidate, width: Width, steps: int) -> int:
    """FLOPs of ``steps`` decode steps after a prefill."""
    layer = get_convention("exact").layer
    one = layer(facts, Rows(1, 1)) - 4 * facts.heads * facts.head_dim  # without its 1 x 1 attention
    total = 0
    for keep in candidate.keeps:
        keys = width.vision * keep // candidate.parts + width.text + (steps + 1) / 2
        total += one * steps + int(4 * steps * keys * facts.heads * facts.head_dim)
    return width.rows * (total + 2 * steps * facts.hidden * facts.vocab)


class Naive:
    """What evaluating a candidate costs without sharing: each question's whole prefill, unpadded.

    Decoding the answers is left out, so the comparison flatters the naive search.
    """

    def __init__(
        self, facts: ModelFacts, prompts: Prompts, blocks: Sequence[Sequence[Question]]
    ) -> None:
        self.facts = facts
        self.widths = [[_width(prompts, question) for question in block] for block in blocks]
        self._known: dict[tuple[str, Width], int] = {}

    @property
    def mean(self) -> tuple[int, int]:
        """Vision and text tokens of a prompt, their means in whole tokens."""
        widths = [width for block in self.widths for width in block]
        vision, text = sum(width.vision for width in widths), sum(width.text for width in widths)
        return round(vision / len(widths)), round(text / len(widths))

    def __call__(self, candidate: Candidate, shard: Shard) -> int:
        """FLOPs of the shard's questions under ``candidate``."""
        return sum(self._of(candidate, self.widths[shard.block][row]) for row in shard.rows)

    def _of(self, candidate: Candidate, width: Width) -> int:
        key = candidate.key(), width
        if key not in self._known:
            self._known[key] = call_flops(self.facts, candidate, width, 0, self.facts.layers, 1)
        return self._known[key]


def _width(prompts: Prompts, question: Question) -> Width:
    """One question alone."""
    vision = sum(prompts.seen(image).tokens for image in question.images)
    return Width(1, len(prompts.ids(question)) - vision, vision)
