"""VisionZip: tokens that dominate, and the rest in a few that stand for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from vtr_export.keeps import KeepValue, tokens_of
from vtr_export.reductions.reduction import VisionReduction
from vtr_export.reductions.tokens import Tokens

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtr_export.reductions.tokens import Images
    from vtr_export.reductions.tower import Tower


class VisionZip(VisionReduction):
    """``dominant`` tokens by the class token's attention, ``contextual`` ones of all others.

    arXiv 2412.04467 and its code. Dominant: the highest sum over heads in ``layer``. Of the others,
    R of them, every ``R // contextual``-th is a target; each token between goes to the target whose
    key, mean over heads, has the highest cosine, and a target becomes itself and the mean of what
    came. Order: the class token, dominant ones in raster order, targets in raster order.

    As in the code's 54 + 10, the class token is one of ``dominant`` where the projector takes rows
    of a layer that has one. Otherwise (no class token, tokens of several patches, the tower's last
    layer) all of them are patches: ours.
    """

    PAPER: ClassVar[str] = "2412.04467"
    MERGES: ClassVar[bool] = True
    method: Literal["visionzip"] = "visionzip"
    dominant: KeepValue = 54
    contextual: KeepValue = 10
    layer: int = -2

    def misfit(self, tower: Tower) -> tuple[str, str] | None:
        """Every token must still have its key."""
        if tower.is_whole:
            return None
        return "visionzip compares the keys of all tokens, and some are gone", "list it first"

    def has_class_row(self, tower: Tower) -> bool:
        """Whether the class token is one of the dominant."""
        one_layer = tower.merge == 1 and tower.width == tower.hidden
        behind = tower.layers_run < tower.layers
        return tower.has_cls and one_layer and behind and self._dominant(tower) > 0

    def patches(self, tower: Tower) -> int:
        """Dominant tokens that are patches."""
        return self._dominant(tower) - self.has_class_row(tower)

    def targets(self, tower: Tower) -> range:
        """Which of the others become targets."""
        others = tower.grid.tokens - self.patches(tower)
        wanted = min(tokens_of(self.contextual, tower.grid.tokens), others)
        step = max(1, others // max(1, wanted))
        return range(0, others, step)[:wanted]

    def count(self, tower: Tower) -> int:
        """Both kinds."""
        return self._dominant(tower) + len(self.targets(tower))

    def flops(self, tower: Tower) -> int:
        """Scores, keys compared, means."""
        rows = 1 if tower.has_cls else tower.sequence
        score = 2 * rows * tower.sequence * tower.hidden
        targets = len(self.targets(tower))
        merged = tower.grid.tokens - self.patches(tower) - targets
        return score + 2 * merged * targets * (tower.hidden // tower.heads + tower.width)

    def reduce(self, images: Images) -> Tokens:
        """Rank, split, merge what is not dominant."""
        tower = images.tower
        score = images.attention_to(self.layer, "sum")
        count = images.constant([self.patches(tower)], "dominant_count")
        dominant, others = images.call("VtrSplitTokens", [score, count], ["dominant", "others"])
        (own,) = images.call("VtrNarrow", [images.features, dominant], ["dominant_features"])
        context = self._context(images, others)
        minus = images.op("Neg", [images.constant([1], "one")], "several")
        parts = [own, context]
        sources = [dominant, _filled(images, minus, context, "context_source")]
        if self.has_class_row(tower):
            row = _class_row(images)
            parts.insert(0, row)
            sources.insert(0, _filled(images, minus, row, "class_source"))
        return Tokens(
            images.op("Concat", parts, "features", axis=1),
            source=images.op("Concat", sources, "source", axis=1),
        )

    def _context(self, images: Images, others: ir.Value) -> ir.Value:
        """``[I,contextual,C]``: targets, and the means of what is nearest."""
        tower, at = images.tower, self.targets(images.tower)
        grid = tower.grid.rows, tower.merge, tower.grid.columns, tower.merge
        first = images.constant([int(tower.has_cls)], "first")
        given = [images.key(self.layer), images.constant(grid, "key_grid"), first]
        (every,) = images.call("VtrTokenKeys", given, ["every_key"])
        (keys,) = images.call("VtrNarrow", [every, others], ["keys"])
        (rest,) = images.call("VtrNarrow", [images.features, others], ["rest"])
        between = sorted(set(range(tower.grid.tokens - self.patches(tower))) - set(at))
        places = images.constant(at, "targets"), images.constant(between, "between")
        (context,) = images.call("VtrMergeNearest", [keys, rest, *places], ["context"])
        return context

    def _dominant(self, tower: Tower) -> int:
        return tokens_of(self.dominant, tower.grid.tokens)


def _class_row(images: Images) -> ir.Value:
    """``[I,1,C]`` of the layer whose rows the projector takes."""
    stream = images.left(images.tower.layers_run - 1)
    places = images.constant([0], "row_start"), images.constant([1], "row_end")
    return images.op("Slice", [stream, *places, images.constant([1], "row_axis")], "class_row")


def _filled(images: Images, value: ir.Value, like: ir.Value, name: str) -> ir.Value:
    """``value`` for each token of ``like``."""
    shape = images.op("Shape", [like], f"{name}_shape", start=0, end=2)
    return images.op("Expand", [value, shape], name)
