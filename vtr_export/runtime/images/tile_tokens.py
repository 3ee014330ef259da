"""Which of the tiles' tokens an image shows, and where its newlines are: indices, no values."""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vtr_export.errors import InputError
from vtr_export.families import Anyres

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]
NEWLINE = 0  # its row; the tokens of the first tile follow
SHRINK_FROM = 1.1  # times as long and wide as max_tiles allow


@dataclass(frozen=True)
class Tokens:
    """Each token is the sum of four rows, weighted; what is one row alone has weights 1, 0, 0, 0.

    Row 0 is the newline, row n + 1 the n-th token of the image's tiles.
    """

    index: Ints  # [tokens, 4]
    weight: Floats  # [tokens, 4]

    def __len__(self) -> int:
        return len(self.index)

    def after(self, rows: int) -> "Tokens":
        """The same where ``rows`` tokens of earlier tiles come first."""
        index = np.where(self.index == NEWLINE, NEWLINE, self.index + rows)
        return Tokens(index, self.weight)


def tiled(anyres: Anyres, tiles: tuple[int, int], height: int, width: int) -> Tokens:
    """Tokens of an image of ``height`` by ``width`` pixels: the whole one's, then its tiles'.

    ``tiles`` are rows and columns of tiles; the image lies in their middle, and tokens of the
    padding around it are left out. A newline ends each row.
    """
    side, count = anyres.side, anyres.side**2
    rows, columns = tiles
    numbers = np.arange(rows * columns * count).reshape(rows, columns, side, side)
    grid = numbers.transpose(0, 2, 1, 3).reshape(rows * side, columns * side) + count + 1
    seen = plain(_unpadded(grid, height, width))
    size = _shrunk(anyres, *seen.index.shape[:2])
    if size is not None:
        seen = _blended(seen.index[..., 0], size)
    return joined(all_of_first(anyres), _with_newlines(seen))


def all_of_first(anyres: Anyres) -> Tokens:
    """All tokens of the first tile."""
    return plain(np.arange(1, anyres.side**2 + 1))


def pooled(anyres: Anyres, frames: int) -> Tokens:
    """A tile for each frame of a video, halved both ways, and one newline at the end."""
    side, count = anyres.side, anyres.side**2
    half = -(-side // 2)
    small = _blended(np.arange(1, count + 1).reshape(side, side), (half, half))
    one = Tokens(small.index.reshape(-1, 4), small.weight.reshape(-1, 4))
    return joined(*(one.after(number * count) for number in range(frames)), newline())


def plain(rows: Ints) -> Tokens:
    """Each of ``rows`` [...] as it is."""
    index = np.full((*rows.shape, 4), NEWLINE, np.int64)
    index[..., 0] = rows
    weight = np.zeros(index.shape, np.float32)
    weight[..., 0] = 1
    return Tokens(index, weight)


def joined(*parts: Tokens) -> Tokens:
    """One after another."""
    return Tokens(
        np.concatenate([part.index for part in parts]),
        np.concatenate([part.weight for part in parts]),
    )


def newline() -> Tokens:
    """One."""
    return plain(np.array([NEWLINE]))


def _unpadded(grid: Ints, height: int, width: int) -> Ints:
    """The middle of ``grid`` that an image of this shape fills."""
    rows, columns = grid.shape
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[cut : rows - cut]
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, cut : columns - cut]


def _shrunk(anyres: Anyres, rows: int, columns: int) -> tuple[int, int] | None:
    """Rows and columns of what is too large; None as long as it is not."""
    if anyres.max_tiles is None:
        return None
    ratio = math.sqrt(rows * columns / (anyres.max_tiles * anyres.side**2))
    if ratio <= SHRINK_FROM:
        return None
    size = int(rows // ratio), int(columns // ratio)
    if not all(size):
        raise InputError(
            f"{rows}x{columns} tokens of an image would be shrunk to none",
            hint="crop it to a less extreme shape first",
        )
    return size


def _blended(grid: Ints, size: tuple[int, int]) -> Tokens:
    """``grid`` [rows, columns] shrunk to ``size`` by bilinear interpolation of pixel centres."""
    (top, bottom, down), (left, right, across) = (
        _neighbours(old, new) for old, new in zip(grid.shape, size, strict=True)
    )
    corners = [grid[np.ix_(row, column)] for row in (top, bottom) for column in (left, right)]
    shares = [np.outer(y, x) for y in (1 - down, down) for x in (1 - across, across)]
    return Tokens(np.stack(corners, -1), np.stack(shares, -1).astype(np.float32))


def _neighbours(old: int, new: int) -> tuple[Ints, Ints, Floats]:
    """Of each of ``new`` places: the ``old`` ones on both sides, and the share of the second."""
    scale = np.float32(old) / np.float32(new)
    centres = np.maximum(
        scale * (np.arange(new, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0
    )
    first = np.minimum(centres.astype(np.int64), old - 1)
    return first, np.minimum(first + 1, old - 1), (centres - first).astype(np.float32)


def _with_newlines(seen: Tokens) -> Tokens:
    """``seen`` [rows, columns] in reading order, a newline behind each row."""
    ends = plain(np.full((len(seen), 1), NEWLINE))
    index = np.concatenate((seen.index, ends.index), axis=1)
    weight = np.concatenate((seen.weight, ends.weight), axis=1)
    return Tokens(index.reshape(-1, 4), weight.reshape(-1, 4))
