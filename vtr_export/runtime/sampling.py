"""Which token comes next: the best one, or one drawn with numpy."""

from dataclasses import dataclass

import numpy as np

from vtr_export.errors import ArtifactError, InputError
from vtr_export.runtime.batch import Ints
from vtr_export.runtime.session import Array


@dataclass(frozen=True)
class Options:
    """How to answer. ``temperature`` 0 takes the best token; ``top_k`` 0 and ``top_p`` 1 keep all.

    A limit is applied to what the one before left, as transformers does: temperature, top_k, top_p.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (the best token) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise InputError(f"{name} is {getattr(self, name)}", hint=f"give {rule}")


class Sampler:
    """Draws for the rows of a batch; a row's draws depend on the seed and its number alone."""

    def __init__(self, options: Options, rows: int) -> None:
        self._options = options
        self._random = [np.random.default_rng([options.seed, row]) for row in range(rows)]

    def pick(self, logits: Array) -> Ints:
        """``[B]`` token ids from ``[B, vocab]`` logits. ArtifactError when they are NaN."""
        if np.isnan(logits).any():
            raise ArtifactError(
                "the decoder returned NaN",
                hint="a value left the range of fp16: export again with --dtype fp32 or bf16",
            )
        if self._options.temperature == 0:
            best: Ints = logits.argmax(axis=1).astype(np.int64)
            return best
        drawn = [self._draw(row, random) for row, random in zip(logits, self._random, strict=True)]
        return np.array(drawn, np.int64)

    def _draw(self, logits: Array, random: np.random.Generator) -> int:
        probabilities = distribution(logits, self._options)
        return int(random.choice(len(probabilities), p=probabilities))


def distribution(logits: Array, options: Options) -> Array:
    """``[vocab]`` float64 probabilities after temperature, top_k and top_p; sums to one."""
    scores = logits.astype(np.float64) / options.temperature
    order = np.argsort(-scores, kind="stable")
    if 0 < options.top_k < len(scores):
        scores[scores < scores[order[options.top_k - 1]]] = -np.inf
    probabilities = _softmax(scores)
    if options.top_p < 1:
        before = np.cumsum(probabilities[order]) - probabilities[order]
        scores[order[before >= options.top_p]] = -np.inf
        probabilities = _softmax(scores)
    return probabilities


def _softmax(scores: Array) -> Array:
    weights: Array = np.exp(scores - scores.max())
    weights /= weights.sum()
    return weights
