"""Scenes of real handwritten digits: coloured, on textured grounds, the same from the same seed."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Split = Literal["train", "held_out"]
Array = NDArray[Any]

IMAGE, PATCH, GRID, MOST = 96, 8, 3, 5
CELL, BOX = IMAGE // GRID, 28
HELD_OUT, SPLIT_SEED = 297, 1998
VARIANTS, TEXTURES, TEXTURE = 16, 256, 128
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 185, 60),
    "blue": (55, 90, 240),
    "yellow": (240, 225, 50),
    "purple": (165, 60, 210),
    "orange": (250, 135, 25),
    "cyan": (60, 215, 230),
    "white": (242, 242, 242),
}
EXTREMES = ("leftmost", "rightmost", "topmost", "bottommost")


@dataclass(frozen=True)
class Scenes:
    """``B`` scenes of up to five digits, all different in value, colour and cell; -1 is none."""

    images: Array  # [B, 96, 96, 3] uint8
    digits: Array  # [B, 5]
    colours: Array  # [B, 5]
    cells: Array  # [B, 5], row-major in a 3 x 3 grid
    ink: Array  # [B, 96, 96] float32 in 0..1
    extremes: Array  # [B, 4], the slot alone in the outermost column or row, or -1


@dataclass(frozen=True)
class PatchLabels:
    """What each 8 x 8 patch shows, row-major; a training aid."""

    digit: Array  # [B, 144], 10 is none
    colour: Array  # [B, 144], len(COLOURS) is none
    extreme: Array  # [B, 144, 4] bool
    count: Array  # [B, 144], -100 where there is no ink


@cache
def glyphs(split: Split) -> tuple[Array, Array]:
    """The UCI digits of one side of the split, ``[N, 8, 8]`` in 0..1, and their values."""
    data = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
    chosen = order[:HELD_OUT] if split == "held_out" else order[HELD_OUT:]
    return (data.images[chosen] / 16).astype(np.float32), data.target[chosen]


@cache
def drawn(split: Split, seed: int) -> tuple[Array, tuple[Array, ...]]:
    """Glyphs scaled, turned and slanted, ``[N * VARIANTS, 28, 28]`` uint8; rows of each value."""
    images, values = glyphs(split)
    images, values = images.repeat(VARIANTS, 0), values.repeat(VARIANTS)
    ink = np.clip(_warp(images, np.random.default_rng([seed, 1])) * 1.3, 0, 1)
    rows = tuple(np.flatnonzero(values == value) for value in range(10))
    return (ink * 255).astype(np.uint8), rows


def _warp(images: Array, rng: np.random.Generator) -> Array:
    """Bilinear samples of ``images`` on a 28 x 28 grid under a random affine map each."""
    count = len(images)
    angle = np.deg2rad(rng.uniform(-12, 12, count))
    scale = 3.1 * rng.uniform(0.88, 1.08, count)
    slant = rng.uniform(-0.15, 0.15, count)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    axis = np.arange(BOX) - (BOX - 1) / 2
    y, x = axis[None, :, None], axis[None, None, :]
    source_y = sin[:, None, None] * x + cos[:, None, None] * y + 4.5
    source_x = (cos[:, None, None]) * (x + slant[:, None, None] * y) - sin[:, None, None] * y + 4.5
    padded = np.pad(images, ((0, 0), (1, 2), (1, 2)))
    source_y, source_x = np.clip(source_y, 0, 9), np.clip(source_x, 0, 9)
    top, left = source_y.astype(np.int64), source_x.astype(np.int64)
    down, right = (source_y - top).astype(np.float32), (source_x - left).astype(np.float32)
    n = np.arange(count)[:, None, None]
    upper = padded[n, top, left] * (1 - right) + padded[n, top, left + 1] * right
    lower = padded[n, top + 1, left] * (1 - right) + padded[n, top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


@cache
def textures(seed: int) -> Array:
    """Muted grounds: clouds, stripes and grain, ``[256, 128, 128, 3]`` uint8."""
    rng = np.random.default_rng([seed, 2])
    axis = np.arange(TEXTURE, dtype=np.float32)
    out = np.empty((TEXTURES, TEXTURE, TEXTURE, 3), np.uint8)
    for texture in out:
        clouds = rng.uniform(0, 1, (8, 8)).astype(np.float32)
        spread = np.clip(1 - np.abs(axis[:, None] / 18 - np.arange(8)), 0, 1)
        angle, period = rng.uniform(0, np.pi), rng.uniform(5, 24)
        phase = axis[:, None] * np.sin(angle) + axis * np.cos(angle)
        stripes = np.sin(phase * (2 * np.pi / period)) * rng.uniform(0, 0.25)
        light = spread @ clouds @ spread.T * 0.6 + stripes
        light = light + rng.normal(0, rng.uniform(0.02, 0.1), light.shape)
        tint = rng.uniform(30, 90, 3)
        texture[:] = np.clip(light[:, :, None] * tint + rng.uniform(5, 40, 3), 0, 255)
    return out


def make(split: Split, seed: int, step: int, count: int) -> Scenes:
    """``count`` scenes, a function of the arguments alone."""
    rng = np.random.default_rng([seed, step, split == "held_out"])
    number = rng.integers(1, MOST + 1, count)
    absent = np.arange(MOST)[None] >= number[:, None]
    digits = np.where(absent, -1, rng.random((count, 10)).argsort(1)[:, :MOST])
    colours = np.where(absent, -1, rng.random((count, len(COLOURS))).argsort(1)[:, :MOST])
    cells, extremes = _place(rng, absent)
    images, ink = _paint(split, rng, digits, colours, cells)
    return Scenes(images, digits, colours, cells, ink, extremes)


def _place(rng: np.random.Generator, absent: Array) -> tuple[Array, Array]:
    """Cells for each slot such that some digit is alone in the outermost row or column."""
    cells = np.full(absent.shape, -1)
    extremes = np.full((len(absent), 4), -1)
    todo = np.arange(len(absent))
    while len(todo):
        drawn_cells = rng.random((len(todo), GRID * GRID)).argsort(1)[:, :MOST]
        cells[todo] = np.where(absent[todo], -1, drawn_cells)
        extremes[todo] = _extremes(cells[todo])
        todo = todo[(extremes[todo] < 0).all(1)]
    return cells, extremes


def _extremes(cells: Array) -> Array:
    column, row = cells % GRID, cells // GRID
    found = []
    for outwards in (-column, column, -row, row):
        reach = np.where(cells < 0, -99, outwards)
        alone = (reach == reach.max(1, keepdims=True)).sum(1) == 1
        found.append(np.where(alone, reach.argmax(1), -1))
    return np.stack(found, 1)


def _paint(
    split: Split, rng: np.random.Generator, digits: Array, colours: Array, cells: Array
) -> tuple[Array, Array]:
    images = _grounds(split, rng, len(digits))
    ink = np.zeros(images.shape[:3], np.float32)
    bank, rows = drawn(split, SPLIT_SEED)
    palette = np.array(list(COLOURS.values()), np.float32)
    window = np.arange(BOX)
    for slot in range(MOST):
        scene = np.flatnonzero(digits[:, slot] >= 0)
        pick = [rows[digit][int(rng.integers(len(rows[digit])))] for digit in digits[scene, slot]]
        glyph = bank[np.array(pick, np.int64)].astype(np.float32) / 255
        shift = rng.integers(0, CELL - BOX + 1, (2, len(scene), 1))
        y = (cells[scene, slot] // GRID)[:, None] * CELL + shift[0] + window
        x = (cells[scene, slot] % GRID)[:, None] * CELL + shift[1] + window
        where = scene[:, None, None], y[:, :, None], x[:, None, :]
        paint = palette[colours[scene, slot]] + rng.normal(0, 8, (len(scene), 3))
        alpha = glyph[..., None]
        images[where] = (
            images[where] * (1 - alpha) + paint[:, None, None].astype(np.float32) * alpha
        )
        ink[where] = glyph
    return np.clip(images, 0, 255).astype(np.uint8), ink


def _grounds(split: Split, rng: np.random.Generator, count: int) -> Array:
    bank = textures(SPLIT_SEED + (split == "held_out"))
    y, x = rng.integers(0, TEXTURE - IMAGE + 1, (2, count))
    picks = bank[rng.integers(0, TEXTURES, count)]
    crops = [picks[i, y[i] : y[i] + IMAGE, x[i] : x[i] + IMAGE] for i in range(count)]
    return np.stack(crops).astype(np.float32) * rng.uniform(0.7, 1.2, (count, 1, 1, 1)).astype("f4")


def patch_labels(scenes: Scenes) -> PatchLabels:
    """What each patch shows: of a patch without ink, nothing."""
    count, side = len(scenes.images), IMAGE // PATCH
    tiles = scenes.ink.reshape(count, side, PATCH, side, PATCH).mean((2, 4))
    inked = tiles.reshape(count, -1) > 0.08
    slot_of_cell = np.full((count, GRID * GRID), -1)
    scene, slot = np.nonzero(scenes.cells >= 0)
    slot_of_cell[scene, scenes.cells[scene, slot]] = slot
    axis = np.arange(side) * GRID // side
    slots = slot_of_cell[:, (axis[:, None] * GRID + axis).reshape(-1)]
    present = (scenes.digits >= 0).sum(1)
    return PatchLabels(
        digit=np.where(inked, np.take_along_axis(scenes.digits, slots, 1), 10),
        colour=np.where(inked, np.take_along_axis(scenes.colours, slots, 1), len(COLOURS)),
        extreme=inked[..., None] & (slots[..., None] == scenes.extremes[:, None]),
        count=np.where(inked, present[:, None] - 1, -100),
    )
