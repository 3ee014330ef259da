"""Draw which vision tokens survive: one panel a stage, dropped patches darkened."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH = 240  # of a panel's image, at least
GAP, CAPTION = 8, 22
DARK = 0.22
_BACK, _INK = (255, 255, 255), (40, 40, 40)


@dataclass(frozen=True)
class Grid:
    """Patches of an image in pixels of the model's view; ``leading`` tokens (CLS) stand first."""

    rows: int
    columns: int
    patch: int
    leading: int = 0

    @classmethod
    def of(cls, height: int, width: int, patch: int, tokens: int) -> "Grid":
        """The grid of an image that becomes ``tokens`` tokens."""
        rows, columns = height // patch, width // patch
        return cls(rows, columns, patch, max(0, tokens - rows * columns))


@dataclass(frozen=True)
class Panel:
    """A stage: its caption, and the numbers of one image's tokens that are left."""

    caption: str
    kept: Collection[int]


def draw(
    views: Sequence[Image.Image], grid: Grid, panels: Sequence[Sequence[Panel]]
) -> Image.Image:
    """One row an image: the view as it is, then ``panels[image]``."""
    whole = Panel("what the model sees", range(grid.leading + grid.rows * grid.columns))
    rows = [
        [_panel(view, grid, panel) for panel in (whole, *stages)]
        for view, stages in zip(views, panels, strict=True)
    ]
    width, height = rows[0][0].size
    sheet = Image.new(
        "RGB",
        (max(map(len, rows)) * (width + GAP) + GAP, len(rows) * (height + GAP) + GAP),
        _BACK,
    )
    for y, row in enumerate(rows):
        for x, panel in enumerate(row):
            sheet.paste(panel, (GAP + x * (width + GAP), GAP + y * (height + GAP)))
    return sheet


def darken(view: Image.Image, grid: Grid, kept: Collection[int], scale: int = 1) -> Image.Image:
    """The view ``scale`` times larger, patches whose tokens are gone darkened."""
    size = (view.width * scale, view.height * scale)
    pixels = np.array(view.resize(size, Image.Resampling.LANCZOS), np.float64)
    left = np.zeros(grid.leading + grid.rows * grid.columns, bool)
    left[list(kept)] = True
    light = np.where(left[grid.leading :].reshape(grid.rows, grid.columns), 1.0, DARK)
    cell = grid.patch * scale
    light = light.repeat(cell, axis=0).repeat(cell, axis=1)
    pixels[: light.shape[0], : light.shape[1]] *= light[:, :, None]
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def _panel(view: Image.Image, grid: Grid, panel: Panel) -> Image.Image:
    picture = darken(view, grid, panel.kept, max(1, math.ceil(WIDTH / view.width)))
    framed = Image.new("RGB", (picture.width, picture.height + CAPTION), _BACK)
    framed.paste(picture, (0, CAPTION))
    font = ImageFont.load_default(13)
    ImageDraw.Draw(framed).text((0, 3), panel.caption, fill=_INK, font=font)
    return framed
