"""Images as keys of cross-attention: which features a row has, and which of its tokens see them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtr_export.families import Sight
from vtr_export.runtime.batch import Batch, Ints
from vtr_export.runtime.images import Seen
from vtr_export.runtime.session import Array

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Keys:
    """Columns of vision keys of a call, without what is in them.

    A row's keys that its last token does not see come first, in reading order, then those it
    does; a row with fewer begins with pads. Keys that no token sees are left out.
    """

    features: Ints  # [B, V] which of the call's features stands there; -1: a pad
    numbers: Ints  # [B, V] which of the row's vision tokens that is; -1: none
    seen: Bools  # [B, S, V]
    rows: Ints  # [B, S] 1: the rest of a cross layer counts in it

    def states(self, features: Array) -> Array:
        """``[B, V, D]`` of ``features`` ``[images, keys, D]``."""
        return states_at(features, self.features)

    @property
    def real(self) -> Bools:
        """``[B, V]``: what the last token sees, and a cut ranks."""
        return self.seen[:, -1]


@dataclass(frozen=True)
class Crossed:
    """What a decoder is given of one call's images."""

    states: Array  # [B, V, D]
    seen: Bools  # [B, S, V]
    rows: Ints  # [B, S]


def states_at(features: Array, places: Ints) -> Array:
    """``[B, V, D]``: ``features`` ``[…, D]`` at ``places`` ``[B, V]``; those of -1 are zeros."""
    flat = features.reshape(-1, features.shape[-1])
    states: Array = np.concatenate((flat, np.zeros_like(flat[:1])))[places]
    return states


def lay_out(
    batch: Batch, image_token_id: int | None, images: Sequence[Seen], each: int, sight: Sight
) -> Keys:
    """Keys of ``images``, in reading order of the rows; each has ``each`` features.

    Of these only the first are vision tokens; the rest (tiles that are none) is for tokens that
    see no image, where ``sight`` is onward: they attend to all there is, and do not count.
    """
    left, start, rows = list(images), 0, []
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        is_place = (ids == image_token_id) & (mask == 1)
        own = [left.pop(0) for _ in range(int(is_place.sum()))]
        rows.append(_row(is_place, mask == 1, own, each, start, sight))
        start += len(own) * each
    width = max(len(row.features[0]) for row in rows)
    return Keys(
        *(np.concatenate(parts) for parts in zip(*(_wide(r, width) for r in rows), strict=True))
    )


def _row(
    is_place: Bools, real: Bools, own: Sequence[Seen], each: int, start: int, sight: Sight
) -> Keys:
    used = np.concatenate([np.arange(each) < image.tokens for image in own] or [np.zeros(0, bool)])
    seen = np.repeat(sees(is_place, sight), each, axis=1) & used
    counts = seen.any(axis=1) & real
    if sight == "onward":
        seen[real & ~counts] = True
    order = np.argsort(seen[-1], kind="stable")
    order = order[seen[:, order].any(axis=0)]
    numbers = np.where(used, np.cumsum(used) - 1, -1)
    return Keys(
        (start + order)[None],
        numbers[order][None],
        seen[None][:, :, order],
        counts.astype(np.int64)[None],
    )


def sees(is_place: Bools, sight: Sight) -> Bools:
    """``[S, images]``: which images a token sees.

    onward: those from its place on, until another image stands elsewhere; those that stand side
    by side are seen together. latest: the last one before it.
    """
    places, columns = np.flatnonzero(is_place), np.arange(len(is_place))
    ends = np.full(len(places), len(is_place))
    for number in range(len(places) - 2, -1, -1):
        beside = places[number + 1] == places[number] + 1
        ends[number] = ends[number + 1] if beside and sight == "onward" else places[number + 1]
    found: Bools = (columns[:, None] >= places) & (columns[:, None] < ends)
    return found


def _wide(row: Keys, width: int) -> tuple[Ints, Ints, Bools, Ints]:
    """With pads in front."""
    pads = width - row.features.shape[1]
    front = ((0, 0), (pads, 0))
    return (
        np.pad(row.features, front, constant_values=-1),
        np.pad(row.numbers, front, constant_values=-1),
        np.pad(row.seen, ((0, 0), (0, 0), (pads, 0))),
        row.rows,
    )
