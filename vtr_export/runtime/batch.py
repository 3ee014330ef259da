"""Rows of token ids side by side: left padding and the place of the vision tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtr_export.families import Attends

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One call's rows, left-padded to max(text) + max(vision tokens)."""

    input_ids: Ints  # [B, S]
    attention_mask: Ints  # [B, S] 1 = real
    vision_index: Ints  # [B, V] columns, ascending; a row with fewer begins with leftmost pads


def pad_batch(rows: Sequence[Sequence[int]], pad_id: int, image_token_id: int | None) -> Batch:
    """Put rows side by side. The width leaves every row the pads that its index needs."""
    vision = [sum(token == image_token_id for token in row) for row in rows]
    text = [len(row) - count for row, count in zip(rows, vision, strict=True)]
    length, width = max(text) + max(vision), max(vision)
    ids = np.full((len(rows), length), pad_id, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    index = np.empty((len(rows), width), np.int64)
    for b, row in enumerate(rows):
        ids[b, length - len(row) :] = row
        mask[b, length - len(row) :] = 1
        columns = np.flatnonzero((ids[b] == image_token_id) & (mask[b] == 1))
        index[b] = np.concatenate((np.arange(width - len(columns)), columns))
    return Batch(ids, mask, index)


def flagged(mask: Ints, index: Ints, flags: Ints) -> Ints:
    """``[B, V]`` like ``index``: ``flags`` of vision tokens in reading order; 0 of pads."""
    found = np.zeros_like(index)
    found[np.take_along_axis(mask, index, 1) != 0] = flags
    return found


def token_groups(
    batch: Batch, image_token_id: int | None, attends: Attends, marked: Sequence[int] = ()
) -> Ints:
    """``[B, S]``: tokens of one number see each other; those of 0 see only what came before.

    So do ``marked`` ones, which are -1.
    """
    if marked:
        is_marked = np.isin(batch.input_ids, marked) & (batch.attention_mask == 1)
        return np.where(is_marked, -1, 0).astype(np.int64)
    if attends == "prompt":
        return batch.attention_mask.copy()
    is_image = (batch.input_ids == image_token_id) & (batch.attention_mask == 1)
    if attends == "causal" or not is_image.size:
        return np.zeros_like(batch.input_ids)
    begins = is_image.copy()
    begins[:, 1:] &= ~is_image[:, :-1]
    return np.where(is_image, np.cumsum(begins, axis=1), 0)


def positions(mask: Ints, length: int) -> Ints:
    """``position_ids`` of the last ``length`` columns: how many real tokens came before."""
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -length:]
