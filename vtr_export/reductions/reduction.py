"""What every reduction says of itself."""

from __future__ import annotations

from collections.abc import Mapping
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
    STATIC_FORM: ClassVar[str] = ""  # what to write for it, where there are several forms

    @property
    def form(self) -> Form:
        """Whether the number of tokens follows from the schedule, or from each image."""
        return "static"


class VisionReduction(Reduction):
    """Fewer tokens before the decoder."""

    PROTECTS: ClassVar[bool] = False  # it tells tokens that no later phase drops
    MERGES: ClassVar[bool] = False  # a token that it leaves may stand for several

    @property
    def projects(self) -> bool:
        """Whether it works on what the projector gives, so that no other can follow."""
        return False

    def misfit(self, tower: Tower) -> tuple[str, str] | None:
        """Why it cannot be done on a tower, and what can; None where it can."""
        del tower
        return None

    def weights(self, tower: Tower) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what the checkpoint must hold for it, by name (``vision_sampler.…``)."""
        del tower
        return {}

    def count(self, tower: Tower) -> int:
        """Tokens of an image that are left; of a data-dependent form, at most."""
        raise NotImplementedError

    def fewest(self, tower: Tower) -> int:
        """Tokens of an image that are left; of a data-dependent form, at least."""
        del tower
        return 0

    def protected(self, count: int) -> int:
        """Of ``count`` tokens left of an image, those that no later phase drops."""
        del count
        return 0

    def leaves(self, tower: Tower) -> Tower:
        """The tower as a reduction behind this one sees it; tokens in no grid are a row."""
        own = tower.is_own and not self.MERGES
        return replace(tower, grid=Grid(1, self.count(tower)), is_own=own)

    def flops(self, tower: Tower) -> int:
        """What the reduction itself computes for one image: 2 a multiply-add, as a cost says.

        What it saves inside the tower counts below zero.
        """
        raise NotImplementedError

    def reduce(self, images: Images) -> Tokens:
        """Write it into a vision encoder's graph."""
        raise NotImplementedError


def unranked(method: str) -> tuple[str, str]:
    """The misfit of one that ranks by attention what nobody attended to."""
    return f"{method} ranks by attention, and some tokens stand for several", "list it first"
