"""Draw which vision tokens survive: one panel a stage, dropped patches darkened."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vtr_export.errors import InputError
from vtr_export.runtime.images import Seen

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
    def of(cls, view: Image.Image, image: Seen) -> "Grid":
        """The grid of an image that is seen as ``view``; InputError where it has none."""
        if image.grid is None or image.grid[0] > 1:
            raise InputError(
                "the tokens of this image lie in no single grid: what is kept cannot be drawn",
                hint="leave --show-kept out; the answer's JSON lists the kept tokens",
            )
        _, rows, columns = image.grid
        return cls(rows, columns, view.height // rows, image.tokens - rows * columns)


@dataclass(frozen=True)
class Panel:
    """A stage: its caption, and the numbers of one image's tokens that are left."""

    caption: str
    kept: Collection[int]


def draw(
    views: Sequence[Image.Image], grids: Sequence[Grid], panels: Sequence[Sequence[Panel]]
) -> Image.Image:
    """One row an image: the view as it is, then ``panels[image]``."""
    rows = [
        [_panel(view, grid, panel) for panel in (_whole(grid), *stages)]
        for view, grid, stages in zip(views, grids, panels, strict=True)
    ]
    width = max(len(row) * (row[0].width + GAP) for row in rows)
    sheet = Image.new("RGB", (width + GAP, sum(row[0].height + GAP for row in rows) + GAP), _BACK)
    top = GAP
    for row in rows:
        for x, panel in enumerate(row):
            sheet.paste(panel, (GAP + x * (panel.width + GAP), top))
        top += row[0].height + GAP
    return sheet


def _whole(grid: Grid) -> Panel:
    return Panel("what the model sees", range(grid.leading + grid.rows * grid.columns))


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
