"""What every reduction says of itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from vtr_export.keeps import StrictModel
from vtr_export.reductions.tower import Grid, Tower

if TYPE_CHECKING:
    from vtr_export.reductions.tokens import Images, Tokens

Form = Literal["static", "data-dependent"]


class Reduction(StrictModel):
    """One entry of a schedule's list: ``method`` names it, its other fields are its numbers."""

    method: str
    PAPER: ClassVar[str] = ""  # arXiv number

    @property
    def form(self) -> Form:
        """Whether the number of tokens follows from the schedule, or from each image."""
        return "static"


class VisionReduction(Reduction):
    """Fewer tokens before the decoder."""

    def misfit(self, tower: Tower) -> tuple[str, str] | None:
        """Why it cannot be done on a tower, and what can; None where it can."""
        del tower
        return None

    def count(self, tower: Tower) -> int:
        """Tokens of an image that are left; of a data-dependent form, at most."""
        raise NotImplementedError

    def leaves(self, tower: Tower) -> Tower:
        """The tower as a reduction behind this one sees it; tokens in no grid are a row."""
        return replace(tower, grid=Grid(1, self.count(tower)))

    def flops(self, tower: Tower) -> int:
        """What the reduction itself computes for one image: 2 a multiply-add, as a cost says.

        What it saves inside the tower counts below zero.
        """
        raise NotImplementedError

    def reduce(self, images: Images) -> Tokens:
        """Write it into a vision encoder's graph."""
        raise NotImplementedError
