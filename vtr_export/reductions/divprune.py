"""DivPrune: tokens as far from each other as can be."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from vtr_export.keeps import KeepValue, tokens_of
from vtr_export.reductions.reduction import VisionReduction
from vtr_export.reductions.tokens import Tokens

if TYPE_CHECKING:
    from vtr_export.reductions.tokens import Images
    from vtr_export.reductions.tower import Tower


class DivPrune(VisionReduction):
    """``keep`` tokens whose least distance, 1 - cosine of projected features, is greedily largest.

    arXiv 2503.02175 and its code. First the token that is farthest from its nearest, then, again
    and again, the one farthest from all that are taken; raster order. A share is rounded down (the
    code rounds to the nearest). What is taken is never taken again (the code's may come twice
    where all that are left equal one of them); of equally far ones the first.

    Cost: the projector for all N tokens, N x N cosines once, which the first choice needs anyhow,
    then one row of them a step. Steps follow one another, in an ONNX Loop with a constant trip
    count; TensorRT is given them written out, about ten layers a step. On a GPU a step takes a few
    launches, however little it computes: many tokens kept may cost more than they save.
    """

    PAPER: ClassVar[str] = "2503.02175"
    method: Literal["divprune"] = "divprune"
    keep: KeepValue

    def count(self, tower: Tower) -> int:
        """``keep``, of all tokens."""
        return tokens_of(self.keep, tower.grid.tokens)

    def flops(self, tower: Tower) -> int:
        """All cosines; and what goes that was projected all the same."""
        tokens = tower.grid.tokens
        dropped = tokens - self.count(tower)
        return 2 * tokens**2 * tower.projected + 2 * dropped * tower.projector_macs

    def reduce(self, images: Images) -> Tokens:
        """Compare, choose, narrow."""
        projected = images.projected
        keep = images.constant([self.count(images.tower)], "keep")
        (cosine,) = images.call("VtrCosine", [projected], ["cosine"])
        (source,) = images.call("VtrFarthest", [cosine, keep], ["source"])
        (features,) = images.call("VtrNarrow", [images.features, source], ["features"])
        (shown,) = images.call("VtrNarrow", [projected, source], ["shown"])
        return Tokens(features, source=source, projected=shown)
