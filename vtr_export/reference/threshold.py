"""MustDrop's cut, from its definition: what is below both thresholds goes, unless protected."""

import torch
from torch import Tensor

from vtr_export.reference.cut import PAD_SCORE, Budget, Streams, best_of_rows, margin_of, row_shares
from vtr_export.reference.layers import Attention
from vtr_export.schedule import Keep
from vtr_export.schedule_document import Threshold

ENOUGH = 1.0  # at least: a token stays
FAR, SAFE = 1e30, 2e30  # above any threshold; above that
PROTECTED_SCORE = 2.0  # above every probability


def marked(vision: Tensor, protected: Tensor | None, columns: Tensor) -> Tensor:
    """``[B, S]`` bool like ``columns``: those of the ``vision`` tokens that are ``protected``."""
    marks = torch.zeros_like(columns, dtype=torch.bool)
    if protected is None:
        return marks
    return marks.scatter(1, vision, protected != 0)


def evidence(
    attention: Attention, streams: Streams, query: str, heads: str, threshold: Threshold
) -> Tensor:
    """``[B, V]`` fp32: how many times a threshold each token gets, of the one it is nearer to.

    arXiv 2411.10803, section 3.3, with a the mean attention of text rows: a token is dropped iff
    sum_rows(a_i) < whole * sum(a) and max_rows(a_i) < single. NaN is below nothing.
    """
    score = torch.full(streams.vision.shape, PAD_SCORE, device=streams.mask.device)
    if streams.vision.shape[1] == 0:
        return score
    is_real, is_protected = streams.is_real(), streams.is_protected()
    for row, shares in row_shares(attention, streams, query, heads):
        given, peak = shares.sum(0), shares.amax(0)
        of_whole = given / (threshold.whole * given[is_real[row]].sum())
        of_single = peak / threshold.single if threshold.single else peak.new_full(peak.shape, FAR)
        ratios = torch.stack((of_whole, of_single))
        found = torch.where(ratios.isnan(), ENOUGH, ratios).amax(0).clamp(max=FAR)
        found[is_protected[row]] = SAFE
        score[row] = torch.where(is_real[row], found, PAD_SCORE)
    return score


def above(score: Tensor, is_real: Tensor, keep: Keep, budget: Budget) -> Tensor:
    """Entries of the vision index that stay ``[B, k]``: of each row at most what ``keep`` says.

    k is the largest number of any row, as ``cut.select`` fills the others.
    """
    enough = (score >= ENOUGH).sum(1).tolist()
    counts = [min(keep.of(tokens), n) for tokens, n in zip(budget[1], enough, strict=True)]
    return best_of_rows(score, is_real, max(counts), counts)


def nearest(score: Tensor, is_kept: Tensor) -> Tensor:
    """``[B]``: the least distance from the threshold, or between a kept and a dropped token."""
    if score.shape[1] == 0:
        return score.new_full(score.shape[:1], torch.inf)
    distance = torch.where(score > PAD_SCORE, (score - ENOUGH).abs(), torch.inf).amin(1)
    return torch.minimum(distance, margin_of(score, is_kept, 1))


def protected_first(score: Tensor, streams: Streams) -> Tensor:
    """``score`` of ``cut.vision_score``, where protected tokens come before all others."""
    return torch.where(streams.is_protected(), PROTECTED_SCORE, score)
