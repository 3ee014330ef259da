"""A method of a few lines: the tokens whose features are longest."""

from typing import Literal

from vtr_export.keeps import KeepValue, tokens_of
from vtr_export.reductions import Images, Tokens, Tower, VisionReduction


class Longest(VisionReduction):
    """``keep`` tokens by the length of their features, in raster order."""

    method: Literal["longest"] = "longest"
    keep: KeepValue

    def count(self, tower: Tower) -> int:
        """``keep``, of all tokens."""
        return tokens_of(self.keep, tower.grid.tokens)

    def flops(self, tower: Tower) -> int:
        """A square and a sum for each number."""
        return 2 * tower.grid.tokens * tower.width

    def reduce(self, images: Images) -> Tokens:
        """Score, select, gather."""
        keep = images.constant([self.count(images.tower)], "keep")
        (score,) = images.call("ToyLength", [images.features], ["length"])
        (source,) = images.call("VtrTopTokens", [score, keep], ["source"])
        (features,) = images.call("VtrNarrow", [images.features, source], ["features"])
        return Tokens(features, source=source)
