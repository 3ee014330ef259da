"""Patches of all images in one row: where each stands, and which of them see each other.

Patches lie frame by frame, the ``merge`` by ``merge`` of a token together, tokens row by row. A
group is what sees itself; groups are rows of patch numbers, filled up with -1 to one length.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Grid: TypeAlias = tuple[int, int, int]  # frames, rows and columns of patches
Ints: TypeAlias = NDArray[np.int64]
Array: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float32]


def positions(grids: Sequence[Grid], merge: int) -> Ints:
    """``[patches, 2]``: row and column of each patch in its image."""
    parts = []
    for time, rows, columns in grids:
        places = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, -1)
        parts += [places.transpose(1, 3, 2, 4, 0).reshape(-1, 2)] * time
    return np.concatenate(parts).astype(np.int64)


def cut(pixels: Array, patch: int, merge: int) -> Array:
    """``[tokens, unit, channels, patch, patch]`` of pixels ``[channels, height, width]``."""
    channels, height, width = pixels.shape
    rows, columns = (edge // patch // merge for edge in (height, width))
    blocks = pixels.reshape(channels, rows, merge, patch, columns, merge, patch)
    ordered = blocks.transpose(1, 4, 2, 5, 0, 3, 6)
    return ordered.reshape(rows * columns, merge**2, channels, patch, patch)


def buckets(rows: int, columns: int, side: int) -> Ints:
    """``[rows, columns]``: which of ``side`` by ``side`` learned positions a patch takes.

    Both grids lie over one square (NaViT, arXiv 2307.06304); in fp32, as transformers compares.
    """
    edges = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)
    down, across = (
        np.arange(count, dtype=np.float32) * (np.float32(1) / np.float32(count))
        for count in (rows, columns)
    )
    last = np.float32(1 - 1e-6)
    row, column = (
        np.searchsorted(edges, np.minimum(places, last), side="right") for places in (down, across)
    )
    found: Ints = (row[:, None] * side + column).astype(np.int64)
    return found


def frames(grids: Sequence[Grid], merge: int) -> dict[str, Ints]:
    """A frame of an image sees itself: ``frames`` and ``frame_places``."""
    lengths = np.array([rows * columns for time, rows, columns in grids for _ in range(time)])
    ends = np.cumsum(lengths)
    within = np.arange(lengths.max())
    groups = np.where(within < lengths[:, None], (ends - lengths)[:, None] + within, -1)
    return {"frames": groups, "frame_places": places_in(groups, merge**2)}


def windows(grids: Sequence[Grid], merge: int, side: int) -> dict[str, Ints]:
    """A window of ``side`` by ``side`` tokens sees itself: ``windows`` and ``window_places``."""
    parts, start = [], 0
    for time, rows, columns in grids:
        shape = time, rows // merge, columns // merge
        tokens = np.arange(start, start + np.prod(shape)).reshape(shape)
        start += tokens.size
        gaps = [(0, 0), *((0, -length % side) for length in shape[1:])]
        padded = np.pad(tokens, gaps, constant_values=-1)
        high, wide = (length // side for length in padded.shape[1:])
        cut = padded.reshape(time, high, side, wide, side).transpose(0, 1, 3, 2, 4)
        parts.append(cut.reshape(-1, side * side))
    tokens = np.concatenate(parts)[:, :, None]
    patches = np.where(tokens < 0, -1, tokens * merge**2 + np.arange(merge**2))
    groups = patches.reshape(len(patches), -1)
    return {"windows": groups, "window_places": places_in(groups, merge**2)}


def between(grids: Sequence[Grid], merge: int, side: int) -> dict[str, Ints | Floats]:
    """Where each patch lies on a ``side`` by ``side`` grid of learned positions.

    ``interp_indices`` and ``interp_weights`` [tokens, unit, 4]: its four neighbours and their
    shares; an image's corners are the grid's.
    """
    where = positions(grids, merge)
    sizes = np.concatenate([[(rows, columns)] * (t * rows * columns) for t, rows, columns in grids])
    exact = where.astype(np.float32) * (side - 1) / np.maximum(sizes - 1, 1).astype(np.float32)
    low = np.floor(exact)
    taps = np.minimum(low.astype(np.int64)[..., None] + (0, 1), side - 1)  # [patches, 2, 2]
    high = exact - low
    shares = np.stack((1 - high, high), -1)
    indices = taps[:, 0, :, None] * side + taps[:, 1, None, :]
    weights = shares[:, 0, :, None] * shares[:, 1, None, :]
    shape = (-1, merge**2, 4)
    return {"interp_indices": indices.reshape(shape), "interp_weights": weights.reshape(shape)}


def places_in(groups: Ints, unit: int) -> Ints:
    """``[tokens, unit]``: where each patch lies among all entries of ``groups``."""
    flat = groups.reshape(-1)
    places = np.flatnonzero(flat >= 0)
    found = np.empty(len(places), np.int64)
    found[flat[places]] = places
    return found.reshape(-1, unit)
