"""Positions of tokens: a number each, or with mRoPE three (time, row, column)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vtr_export.errors import InputError
from vtr_export.runtime.batch import Batch, Ints
from vtr_export.runtime.images import Seen


@dataclass(frozen=True)
class Places:
    """``ids`` of a call's columns, and the position ``[B]`` that each row goes on with."""

    ids: Ints  # [3, B, S]
    following: Ints  # [B]


def mrope(batch: Batch, image_token_id: int | None, images: Sequence[Seen], starts: Ints) -> Places:
    """Multimodal rotary positions (arXiv 2409.12191, section 2.1).

    Text counts on in all three; an image's tokens stand at one time, and their rows and columns
    are counted from it; what follows goes on behind the largest. ``starts`` ``[B]`` is each row's
    first position; ``images`` are in reading order of the rows. Pads stand at 0.
    """
    left, ids = list(images), np.zeros((3, *batch.input_ids.shape), np.int64)
    following = starts.copy()
    for row, tokens in enumerate(batch.input_ids):
        real = np.flatnonzero(batch.attention_mask[row])
        at, position = 0, int(starts[row])
        while at < len(real):
            if tokens[real[at]] != image_token_id:
                ids[:, row, real[at]] = position
                at, position = at + 1, position + 1
                continue
            own = left.pop(0)
            if own.grid is None:
                raise InputError("an image in tiles has no rows and columns", hint="report it")
            columns = real[at : at + own.tokens]
            ids[:, row, columns] = position + np.indices(own.grid).reshape(3, -1)
            at, position = at + own.tokens, position + max(own.grid)
        following[row] = position
    return Places(ids, following)
