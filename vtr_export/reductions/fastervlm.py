"""FasterVLM: the tokens that the class token looks at most."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from vtr_export.keeps import KeepValue, tokens_of
from vtr_export.reductions.reduction import VisionReduction, unranked
from vtr_export.reductions.tokens import Tokens

if TYPE_CHECKING:
    from vtr_export.reductions.tokens import Images
    from vtr_export.reductions.tower import Tower


class FasterVLM(VisionReduction):
    """``keep`` tokens by the class token's mean attention in ``layer``, in raster order.

    arXiv 2412.01818; ``layer`` -2 is the one whose features LLaVA takes, as in its code.
    """

    PAPER: ClassVar[str] = "2412.01818"
    method: Literal["fastervlm"] = "fastervlm"
    keep: KeepValue
    layer: int = -2

    def misfit(self, tower: Tower) -> tuple[str, str] | None:
        """Attention is given to the tower's own tokens."""
        return None if tower.is_own else unranked(self.method)

    def count(self, tower: Tower) -> int:
        """``keep``, of all tokens."""
        return tokens_of(self.keep, tower.grid.tokens)

    def flops(self, tower: Tower) -> int:
        """One row of attention; of all rows where there is no class token."""
        rows = 1 if tower.has_cls else tower.sequence
        return 2 * rows * tower.sequence * tower.hidden

    def reduce(self, images: Images) -> Tokens:
        """Score, select, gather."""
        score = images.attention_to(self.layer)
        keep = images.constant([self.count(images.tower)], "keep")
        (source,) = images.call("VtrTopTokens", [score, keep], ["source"])
        (features,) = images.call("VtrNarrow", [images.features, source], ["features"])
        return Tokens(features, source=source)
