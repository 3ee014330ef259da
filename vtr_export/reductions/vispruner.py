"""VisPruner: tokens that matter, and others that do not repeat each other."""

from __future__ import annotations

from fractions import Fraction
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from vtr_export.keeps import KeepValue, tokens_of
from vtr_export.reductions.reduction import VisionReduction, unranked
from vtr_export.reductions.tokens import Tokens

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtr_export.reductions.tokens import Images
    from vtr_export.reductions.tower import Tower

EACH_ROUND: Final = 8  # tokens that leave, as published


class VisPruner(VisionReduction):
    """``keep`` tokens: the share ``important`` of them by attention, the others unlike each other.

    arXiv 2412.01818 (its second version) and its code. Important: the class token's mean attention
    in ``layer``. The others are listed by attention. In a round, up to 8 of those at even places
    leave, which have the highest cosine to any at an odd place; then come the even ones that stay,
    most alike first, then the odd ones (the code's order; the paper has none). Raster order.

    Of equal ones the better ranked leaves (in the code, any). Static: how many rounds follows from
    the counts. One matrix of cosines serves all rounds (the code multiplies anew in each); a round
    reads it once, tokens x tokens. The rounds are an ONNX Loop with a constant trip count, which
    is written out for TensorRT.
    """

    PAPER: ClassVar[str] = "2412.01818"
    method: Literal["vispruner"] = "vispruner"
    keep: KeepValue
    important: KeepValue = Fraction(1, 2)
    layer: int = -2

    def misfit(self, tower: Tower) -> tuple[str, str] | None:
        """Attention is given to the tower's own tokens."""
        return None if tower.is_own else unranked(self.method)

    def count(self, tower: Tower) -> int:
        """``keep``, of all tokens."""
        return tokens_of(self.keep, tower.grid.tokens)

    def ranked(self, tower: Tower) -> int:
        """How many are kept by attention alone."""
        return tokens_of(self.important, self.count(tower))

    def removals(self, tower: Tower) -> list[int]:
        """How many leave in each round."""
        wanted = self.count(tower) - self.ranked(tower)
        listed, found = tower.grid.tokens - self.ranked(tower), list[int]()
        while listed > wanted > 0:
            found.append(min(EACH_ROUND, listed - wanted, (listed + 1) // 2))
            listed -= found[-1]
        return found

    def flops(self, tower: Tower) -> int:
        """Scores, and the cosines of the tokens that attention did not keep."""
        rows = 1 if tower.has_cls else tower.sequence
        listed = tower.grid.tokens - self.ranked(tower)
        cosines = 2 * listed**2 * tower.width if self.removals(tower) else 0
        return 2 * rows * tower.sequence * tower.hidden + cosines

    def reduce(self, images: Images) -> Tokens:
        """Rank all, thin out the rest, put both in raster order."""
        tower, ranked = images.tower, self.ranked(images.tower)
        every = images.constant([tower.grid.tokens], "every")
        score = images.attention_to(self.layer)
        (order,) = images.call("VtrTopOrder", [score, every], ["order"])
        bounds = images.constant([0], "start"), images.constant([ranked], "ranked")
        axis = images.constant([1], "axis")
        best = images.op("Slice", [order, *bounds, axis], "best")
        others = images.op("Slice", [order, bounds[1], every, axis], "others")
        chosen = images.op("Concat", [best, self._unlike(images, others)], "chosen", axis=1)
        (source,) = images.call("VtrAscending", [chosen], ["source"])
        (features,) = images.call("VtrNarrow", [images.features, source], ["features"])
        return Tokens(features, source=source)

    def _unlike(self, images: Images, others: ir.Value) -> ir.Value:
        """``[I,keep - ranked]`` of ``others``, which are listed by attention."""
        removals = self.removals(images.tower)
        wanted = self.count(images.tower) - self.ranked(images.tower)
        stay = images.constant([wanted], "stay")
        (rest,) = images.call("VtrNarrow", [images.features, others], ["rest"])
        (place,) = images.call("VtrColumns", [rest], ["place"])
        if removals:
            (cosine,) = images.call("VtrCosine", [rest], ["cosine"])
            length = images.op("Shape", [rest], "length", start=1, end=2)
            for number, (drop, rounds) in enumerate(groupby(removals)):
                said = [
                    images.constant([drop], f"drop_{number}"),
                    images.constant([len(list(rounds))], f"rounds_{number}"),
                ]
                names = [f"place_{number}", f"length_{number}"]
                place, length = images.call("VtrThinOut", [cosine, place, length, *said], names)
        is_left = images.op("Less", [place, stay], "is_left")
        mark = images.op("Cast", [is_left], "mark", to=1)
        (at,) = images.call("VtrTopTokens", [mark, stay], ["at"])
        return images.op("GatherElements", [others, at], "unlike", axis=1)
