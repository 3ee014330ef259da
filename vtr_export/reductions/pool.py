"""Pooling: neighbours in the image become one token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from vtr_export.reductions.reduction import VisionReduction
from vtr_export.reductions.tokens import Tokens
from vtr_export.reductions.tower import Grid

if TYPE_CHECKING:
    from vtr_export.reductions.tokens import Images
    from vtr_export.reductions.tower import Tower

Side = Annotated[int, Field(ge=1)]


class Pool(VisionReduction):
    """A coarser grid: the mean or largest of ``factor`` by ``factor`` tokens, or bilinear between.

    As LLaVA-OneVision's for videos (arXiv 2408.03326): of what the projector gives; mean and max
    leave out rows and columns beyond the last whole window, bilinear rounds up (27 to 14), takes
    the nearest two rows and columns and smooths nothing. ``grid``: rows and columns that are left,
    in place of ``factor``. ``of: features`` pools before the projector, which then has less to do:
    cheaper, and ours.
    """

    PAPER: ClassVar[str] = "2408.03326"
    method: Literal["pool"] = "pool"
    kind: Literal["average", "max", "bilinear"] = "bilinear"
    factor: int = Field(default=2, ge=2)
    grid: tuple[Side, Side] | None = Field(default=None, description="Rows and columns left.")
    of: Literal["projected", "features"] = "projected"

    @property
    def projects(self) -> bool:
        """Where the projector comes first."""
        return self.of == "projected"

    def target(self, tower: Tower) -> Grid:
        """The grid that is left."""
        rows, columns = tower.grid.rows, tower.grid.columns
        if self.grid is not None:
            return Grid(*self.grid)
        if self.kind == "bilinear":
            return Grid(-(-rows // self.factor), -(-columns // self.factor))
        return Grid(rows // self.factor, columns // self.factor)

    def window(self, tower: Tower) -> tuple[int, int]:
        """Rows and columns that become one token, for mean and max."""
        if self.grid is None:
            return self.factor, self.factor
        return tower.grid.rows // self.grid[0], tower.grid.columns // self.grid[1]

    def misfit(self, tower: Tower) -> tuple[str, str] | None:
        """It needs a grid, of whole windows where its target is said."""
        own, target = tower.grid, self.target(tower)
        if own.rows == 1 < tower.patches.rows:
            return "the tokens that are left lie in no grid", "list pool first"
        if not 1 <= target.rows <= own.rows or not 1 <= target.columns <= own.columns:
            given = f"{target.rows} by {target.columns}"
            here = f"{own.rows} by {own.columns}"
            return f"pool cannot make {given} tokens of {here}", "a smaller factor or grid"
        if (
            self.grid
            and self.kind != "bilinear"
            and (own.rows % target.rows or own.columns % target.columns)
        ):
            return (
                f"windows of {own.rows} by {own.columns} tokens do not fill {target.rows} by"
                f" {target.columns}",
                "kind: bilinear, or a grid that divides",
            )
        return None

    def count(self, tower: Tower) -> int:
        """Of the coarser grid."""
        return self.target(tower).tokens

    def leaves(self, tower: Tower) -> Tower:
        """A coarser grid, of tokens that stand for several."""
        return replace(tower, grid=self.target(tower), is_own=False)

    def flops(self, tower: Tower) -> int:
        """An addition a token or four products of a new one; the projector for those that go."""
        width = tower.projected if self.projects else tower.width
        left = self.count(tower)
        pooled = 8 * left if self.kind == "bilinear" else tower.grid.tokens
        dropped = tower.grid.tokens - left if self.projects else 0
        return pooled * width + 2 * dropped * tower.projector_macs

    def reduce(self, images: Images) -> Tokens:
        """Pool what is asked for."""
        stream = images.projected if self.projects else images.features
        own = images.constant((images.tower.grid.rows, images.tower.grid.columns), "own_grid")
        if self.kind == "bilinear":
            target = self.target(images.tower)
            sides = images.constant((target.rows, target.columns), "target_grid")
            operator = "VtrResizeGrid"
        else:
            sides = images.constant(self.window(images.tower), "window")
            operator = "VtrPoolMean" if self.kind == "average" else "VtrPoolMax"
        (pooled,) = images.call(operator, [stream, own, sides], ["pooled"])
        if self.projects:
            return Tokens(images.features, projected=pooled)
        return Tokens(pooled)
