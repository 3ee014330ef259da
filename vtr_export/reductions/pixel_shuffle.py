"""Pixel shuffle: neighbours in the image become one wider token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import Field

from vtr_export.reductions.reduction import VisionReduction
from vtr_export.reductions.tokens import Tokens
from vtr_export.reductions.tower import Grid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vtr_export.reductions.tokens import Images
    from vtr_export.reductions.tower import Tower

PROJECTOR: Final = "vision_sampler.pixel_shuffle."
PARTS: Final = tuple(
    f"{PROJECTOR}{layer}.{part}"
    for layer in ("layer_norm", "linear_1", "linear_2")
    for part in ("weight", "bias")
)


class PixelShuffle(VisionReduction):
    """``factor`` by ``factor`` tokens side by side in one, and a projector that takes it so wide.

    InternVL's (arXiv 2404.16821; ``ps_version`` v2): row by row, in a window too; the published v1
    leaves rows and columns swapped. The model's own projector takes tokens of their usual width,
    so another must be trained, with InternVL's layers (norm, linear, GELU, linear), and be in the
    checkpoint: see ``weights``. A model whose tower shuffles by itself needs no reduction for it.
    """

    PAPER: ClassVar[str] = "2404.16821"
    method: Literal["pixel_shuffle"] = "pixel_shuffle"
    factor: int = Field(default=2, ge=2)

    @property
    def projects(self) -> bool:
        """By its own projector."""
        return True

    def weights(self, tower: Tower) -> Mapping[str, tuple[int, ...]]:
        """``vision_sampler.pixel_shuffle.{layer_norm,linear_1,linear_2}.{weight,bias}``."""
        wide, out = tower.width * self.factor**2, tower.projected
        return dict(
            zip(PARTS, ((wide,), (wide,), (out, wide), (out,), (out, out), (out,)), strict=True)
        )

    def misfit(self, tower: Tower) -> tuple[str, str] | None:
        """It needs a grid of whole windows."""
        rows, columns = tower.grid.rows, tower.grid.columns
        if rows % self.factor == columns % self.factor == 0:
            return None
        if rows == 1 < tower.patches.rows:
            return "the tokens that are left lie in no grid", "leave out what comes before"
        return (
            f"{rows} by {columns} tokens are no windows of {self.factor} by {self.factor}",
            "a factor that divides both",
        )

    def count(self, tower: Tower) -> int:
        """Windows."""
        return tower.grid.tokens // self.factor**2

    def leaves(self, tower: Tower) -> Tower:
        """A coarser grid, of tokens that stand for several."""
        grid = Grid(tower.grid.rows // self.factor, tower.grid.columns // self.factor)
        return replace(tower, grid=grid, is_own=False)

    def flops(self, tower: Tower) -> int:
        """Its projector, in place of the model's."""
        own = (tower.width * self.factor**2 + tower.projected) * tower.projected
        return 2 * self.count(tower) * (own - tower.projector_macs)

    def reduce(self, images: Images) -> Tokens:
        """Shuffle, project."""
        grid = images.constant((images.tower.grid.rows, images.tower.grid.columns), "own_grid")
        window = images.constant((self.factor, self.factor), "window")
        (wide,) = images.call("VtrPixelShuffle", [images.features, grid, window], ["wide"])
        weights = [images.weight(name) for name in PARTS]
        (projected,) = images.call("VtrProjectWide", [wide, *weights], ["projected"])
        return Tokens(images.features, projected=projected)
