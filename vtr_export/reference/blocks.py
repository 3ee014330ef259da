"""What a whole layer's attention ranks by, and what it makes of dropped tokens: FitPrune, FiCoCo-L.

FitPrune: arXiv 2409.10197. FiCoCo-L: arXiv 2411.17686 v4, section 4, where attention that a causal
mask leaves at 0 (from the image to text behind it) is read the other way round, as its words have
it: what a vision token receives from text. So equation 3 takes A[k, i] for A[i, k], and equation 4
A[k, i] A[k, j] for A[i, k] A[k, j]. Its code sums where the paper takes the mean (1/N, 1/M),
normalizes by a softmax, and lets dropped tokens receive; here the paper is followed. The number of
tokens that a dropped one is added to is fixed; the paper finds it by a quantile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vtr_export.reference.cut import NAN_SCORE, PAD_SCORE, Streams, is_among, query_rows
from vtr_export.reference.layers import Attention
from vtr_export.schedule import Resolved
from vtr_export.schedule_document import Correlate

BETA = 0.6  # FiCoCo-L's balance of the two redundancies


@dataclass(frozen=True)
class Blocks:
    """Of one row of a batch: attention in fp32, heads reduced, between what is real."""

    tokens: Tensor  # [N] columns of the real vision tokens
    by_vision: Tensor  # [N, N] row i gives column j
    by_text: Tensor  # [M, N] of the rows that ask


def blocks_of(attention: Attention, streams: Streams, row: int, query: str, heads: str) -> Blocks:
    """What the vision tokens and the asking rows of ``row`` give each vision token."""
    mask, vision = streams.mask[row], streams.vision[row]
    tokens = vision[mask[vision] != 0]
    asking = query_rows(mask[: len(mask) - streams.drafted], vision, query)
    past = attention.keys.shape[2] - len(mask)
    keys = attention.for_each_head(attention.keys)[row].float()

    def given(rows: Tensor) -> Tensor:
        logits = attention.logits(attention.query[row][:, rows].float(), keys)
        odds = logits.masked_fill(~attention.visible[row][rows], -torch.inf).softmax(-1)
        reduced = odds.mean(0) if heads == "mean" else odds.amax(0)
        return reduced[:, past + tokens]

    return Blocks(tokens, given(tokens), given(asking))


def block_score(
    attention: Attention, streams: Streams, query: str, heads: str, rule: str
) -> Tensor:
    """``[B, V]`` fp32 by ``rule``; the least are dropped, so a redundancy is negated."""
    score = torch.full(streams.vision.shape, PAD_SCORE, device=streams.mask.device)
    for row, is_real in enumerate(streams.is_real()):
        if streams.vision.shape[1] and bool(is_real.any()):
            blocks = blocks_of(attention, streams, row, query, heads)
            score[row, is_real] = _RULES[rule](blocks)
    return torch.where(score.isnan(), NAN_SCORE, score)


def _self_cross(blocks: Blocks) -> Tensor:
    self_attention = blocks.by_vision.sum(0) / len(blocks.tokens)
    return self_attention * blocks.by_text.sum(0)


def _redundancy(blocks: Blocks) -> Tensor:
    return -(BETA * blocks.by_vision.mean(1) - (1 - BETA) * blocks.by_text.mean(0))


def _attention(blocks: Blocks) -> Tensor:
    return blocks.by_text.mean(0)


_RULES = {"attention": _attention, "self_cross": _self_cross, "redundancy": _redundancy}


def correlated(
    attention: Attention, streams: Streams, kept: Tensor, merge: Correlate, schedule: Resolved
) -> Tensor:
    """``streams.hidden``, where kept vision tokens have received the dropped ones (FiCoCo).

    Equation 2: each becomes the mean of itself and of its shares of those dropped.
    """
    hidden = streams.hidden.clone()
    if not streams.vision.shape[1]:
        return hidden
    stays = is_among(streams.vision, kept)
    for row, is_real in enumerate(streams.is_real()):
        is_kept = stays[row][is_real]
        if bool(is_kept.any()) and not bool(is_kept.all()):
            blocks = blocks_of(attention, streams, row, schedule.query, schedule.heads)
            shares = _shares(blocks, is_kept, merge)
            targets, sources = blocks.tokens[is_kept], blocks.tokens[~is_kept]
            before = streams.hidden[row].float()
            size = 1 + shares.sum(0)[:, None]
            after = ((before[targets] + shares.T @ before[sources]) / size).to(hidden.dtype)
            hidden[row, targets] = torch.where(size > 1, after, hidden[row, targets])
    return hidden


def _shares(blocks: Blocks, is_kept: Tensor, merge: Correlate) -> Tensor:
    """``[dropped, kept]``: how each dropped token is divided among its most correlated."""
    bridge = blocks.by_text.T @ blocks.by_text / len(blocks.by_text)
    correlation = merge.direct * blocks.by_vision + (1 - merge.direct) * bridge
    among = correlation[~is_kept][:, is_kept]
    order = among.sort(dim=1, descending=True, stable=True)
    best = order.values[:, : merge.nearest]
    sums = best.sum(1, keepdim=True)
    part = torch.where(sums > 0, best / sums, 0.0)
    return torch.zeros_like(among).scatter(1, order.indices[:, : merge.nearest], part)
