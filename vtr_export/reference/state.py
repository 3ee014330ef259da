"""What calls of the oracle leave behind: caches, steps, answers, and calls that are half made."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtr_export.reference.cut import Budget, Streams


@dataclass(frozen=True)
class Cache:
    """What a call leaves behind, per layer and per stage.

    ``padding[0]`` is the attention mask of the unpruned sequence. Where layers cross, those behind
    it are of the vision keys, which stages narrow instead.
    """

    keys: tuple[Tensor | None, ...]  # [B, kv_heads, P_stage, head_dim] of each layer; None: empty
    values: tuple[Tensor | None, ...]  # of latent attention: what both are made of
    padding: tuple[Tensor, ...]  # [B, P_stage] of each stage, 1 = real

    def of(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values of one layer."""
        return self.keys[layer], self.values[layer]


@dataclass(frozen=True)
class Step:
    """One call. The tuples hold one entry a cut: J is between stage J and stage J + 1."""

    logits: Tensor  # [B, 1, vocab] fp32; every surviving row with logits="all"
    hidden: Tensor  # [B, 1, D] or every surviving row: final norm applied, the head's input
    cache: Cache
    kept: tuple[Tensor, ...]  # [B, S_{J+1}] columns of stage J's sequence, ascending
    kept_vision: tuple[Tensor, ...]  # [B, V_{J+1}] columns of stage J + 1's sequence
    margins: tuple[Tensor, ...]  # [B] worst kept minus best dropped score; inf when none is
    scores: tuple[Tensor, ...]  # [B, V_J] fp32; NaN is -1, a pad is -2
    labels: tuple[Tensor, ...] = ()  # [B, V_J] with recycled tokens: whose cluster each is, or -1


@dataclass(frozen=True)
class Generation:
    """A greedy answer; a finished row repeats its end token."""

    tokens: Tensor  # [B, n]
    logits: Tensor  # [B, n, vocab], those each token was chosen from
    hidden: Tensor  # [B, n, D], final norm applied: what the head made them of
    prefill: Step
    cache: Cache  # knows all tokens but the last
    attention_mask: Tensor  # [B, P + S + n - 1]


@dataclass(frozen=True)
class Held:
    """A first call as it stands before ``layer``; a cut there is not made yet.

    Schedules that agree before ``layer``, and in their score, can all go on from it.
    """

    layer: int
    streams: Streams
    score: Tensor | None  # [B, V] fp32: what a cut before ``layer`` ranks by; None before layer 0
    budget: Budget

    def rows(self, chosen: Sequence[int]) -> "Held":
        """Some rows of the batch, as wide as they are."""
        at = torch.tensor(list(chosen), device=self.streams.hidden.device)
        score = None if self.score is None else self.score[at]
        columns, tokens = self.budget
        budget = columns, [tokens[row] for row in chosen]
        return Held(self.layer, self.streams.rows(at), score, budget)

    def to(self, device: str | torch.device) -> "Held":
        """On another device."""
        score = None if self.score is None else self.score.to(device)
        return Held(self.layer, self.streams.to(device), score, self.budget)

    @classmethod
    def join(cls, parts: Sequence["Held"]) -> "Held":
        """Parts of one batch, put together again."""
        first = parts[0]
        scores = [part.score for part in parts if part.score is not None]
        tokens = [count for part in parts for count in part.budget[1]]
        return cls(
            first.layer,
            Streams.join([part.streams for part in parts]),
            torch.cat(scores) if scores else None,
            (first.budget[0], tokens),
        )
