"""MustDrop's vision phase: windows of like tokens become one early on, and key tokens are told."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import Field

from vtr_export.keeps import KeepValue, tokens_of
from vtr_export.reductions.reduction import Form, VisionReduction
from vtr_export.reductions.tokens import Tokens

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtr_export.reductions.tokens import Images
    from vtr_export.reductions.tower import Tower

SIDE: Final = 3  # of a window, in patches


class MustDrop(VisionReduction):
    """Behind ``layer``, each window of 3 by 3 patches becomes their mean if they are alike.

    arXiv 2411.10803, section 3.2. Alike: the mean cosine of all pairs is at least ``similarity``,
    so that each image has a number of its own; with ``windows`` that many of the most alike are
    merged, whatever they are. Merged windows come first, in order, then all other tokens; patches
    beyond the last whole window stay. The ``keys`` share of the tokens left, rounded up, that the
    last layer's class token looks at most (or all tokens, without one) is protected. The published
    code merges as many windows of each image as its batch's least; here an image's own count holds.
    """

    PAPER: ClassVar[str] = "2411.10803"
    PROTECTS: ClassVar[bool] = True
    MERGES: ClassVar[bool] = True
    method: Literal["mustdrop"] = "mustdrop"
    layer: int = Field(default=0, ge=0)
    similarity: float = Field(default=0.8, ge=-1, le=1)
    windows: KeepValue | None = Field(default=None, description="Merged windows: a fixed number.")
    keys: KeepValue = Fraction(2, 25)

    @property
    def form(self) -> Form:
        """Static with ``windows``."""
        return "data-dependent" if self.windows is None else "static"

    def misfit(self, tower: Tower) -> tuple[str, str] | None:
        """It needs a layer to work behind, and the image's grid as it was."""
        if tower.merge > 1:
            return (
                f"a token covers {tower.merge} by {tower.merge} patches, which must all be there",
                "choose a reduction behind the tower, as fastervlm",
            )
        if tower.grid != tower.patches:
            return "it works inside the tower, on all tokens", "list it first"
        if self.layer >= min(tower.layers_run, tower.layers - 1):
            return (
                f"layer is {self.layer}, and no layer behind it feeds the projector",
                f"layer at most {min(tower.layers_run, tower.layers - 1) - 1}",
            )
        if not windows_of(tower):
            return f"no window of {SIDE} by {SIDE} patches fits in", "another method"
        return None

    def merged(self, tower: Tower) -> int:
        """Windows that become one token; of the data-dependent form, at least."""
        return 0 if self.windows is None else tokens_of(self.windows, windows_of(tower))

    def fewest(self, tower: Tower) -> int:
        """All windows merged, where each image has a number of its own."""
        if self.form == "static":
            return self.count(tower)
        return tower.patches.tokens - (SIDE**2 - 1) * windows_of(tower)

    def protected(self, count: int) -> int:
        """Tokens out of ``count`` that no later phase drops: a share is rounded up."""
        if isinstance(self.keys, int):
            return min(self.keys, count)
        return -(-count * self.keys.numerator // self.keys.denominator)

    def count(self, tower: Tower) -> int:
        """All, less 8 of each merged window's 9."""
        return tower.patches.tokens - (SIDE**2 - 1) * self.merged(tower)

    def flops(self, tower: Tower) -> int:
        """Cosines, the last layer's look, less what fewer rows save behind ``layer``."""
        whole, width, left = tower.sequence, tower.hidden, self.count(tower) + tower.has_cls
        asking = 1 if tower.has_cls else left
        macs = 3 * whole * width + asking * left * width
        behind = tower.layers_run - self.layer - 1
        macs -= behind * 4 * (whole - left) * width**2
        macs -= behind * 2 * (whole**2 - left**2) * width
        macs -= behind * 2 * (whole - left) * width * tower.intermediate
        return 2 * macs + tower.last_layer_flops

    def reduce(self, images: Images) -> Tokens:
        """Merge behind ``layer``; ask the last layer what is key."""
        return _Work(self, images).tokens()


def windows_of(tower: Tower) -> int:
    """Whole windows of a tower's patches."""
    return (tower.patches.rows // SIDE) * (tower.patches.columns // SIDE)


class _Work:
    """The operators of one reduction."""

    def __init__(self, reduction: MustDrop, images: Images) -> None:
        self.reduction, self.images, self.tower = reduction, images, images.tower
        self.first = int(images.tower.has_cls)

    def tokens(self) -> Tokens:
        """What is left, which they were, and which are key."""
        images, stream = self.images, self.images.left(self.reduction.layer)
        patches = self._behind_class(stream, "patches") if self.first else stream
        grid = images.constant([self.tower.patches.rows, self.tower.patches.columns], "grid")
        window = images.constant([SIDE, SIDE], "window")
        (likeness,) = images.call("VtrLikeness", [patches, grid, window], ["likeness"])
        chosen, width = self._chosen(likeness, patches, window)
        merged, source, counts = images.call(
            "VtrMergeWindows",
            [patches, grid, window, chosen, width],
            ["merged", "source", "counts"],
        )
        if self.first:
            ends = [images.constant([at], f"class_{at}") for at in (0, 1)]
            own = images.op("Slice", [stream, *ends, ends[1]], "class")
            merged = images.op("Concat", [own, merged], "narrowed", axis=1)
        images.replace(stream, merged)
        if self.reduction.form == "static":
            return Tokens(images.features, source=source, protected=self._key(None, None))
        rows = images.op("Add", [counts, images.constant([self.first], "first")], "rows")
        real, mask = images.call("VtrRealRows", [rows, merged], ["real", "mask"])
        images.show_only(mask, self.reduction.layer)
        return Tokens(images.features, counts, source, self._key(counts, real))

    def _behind_class(self, stream: ir.Value, name: str) -> ir.Value:
        """``[I,N,…]`` without the class token."""
        images = self.images
        end = images.constant([2**63 - 1], f"{name}.end")
        axis = images.constant([1], f"{name}.axis")
        return images.op("Slice", [stream, axis, end, axis], name)

    def _chosen(
        self, likeness: ir.Value, patches: ir.Value, window: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Which windows ``[I,W]`` are merged, and how many tokens the widest image has left."""
        images, reduction = self.images, self.reduction
        if reduction.form == "static":
            number = images.constant([reduction.merged(self.tower)], "windows")
            (chosen,) = images.call("VtrBestWindows", [likeness, number], ["chosen"])
            return chosen, images.constant([reduction.count(self.tower)], "width")
        asked = [likeness, patches, window]
        least = float(reduction.similarity)
        chosen, width = images.call("VtrLikeWindows", asked, ["chosen", "width"], similarity=least)
        return chosen, width

    def _key(self, counts: ir.Value | None, real: ir.Value | None) -> ir.Value:
        """``[I,K]`` bool."""
        images = self.images
        if counts is None or real is None:
            score = images.attention_to(-1)
            number = self.reduction.protected(self.reduction.count(self.tower))
            count = images.constant([number], "keys")
        else:
            score, count = self._score(real), self._share(counts)
        (flags,) = images.call("VtrTopFlags", [score, count], ["protected"])
        return flags

    def _score(self, real: ir.Value) -> ir.Value:
        """What the last layer gives each token, where rows pad some images."""
        images, query = self.images, self.images.query(-1)
        if self.first:
            ends = [images.constant([at], f"asking_{at}") for at in (0, 1, 2)]
            query = images.op("Slice", [query, *ends], "asking")
        asked = [query, images.key(-1), real]
        (score,) = images.call("VtrAskedBy", asked, ["score"], scale=images.scale(-1))
        return self._behind_class(score, "patch_score") if self.first else score

    def _share(self, counts: ir.Value) -> ir.Value:
        """``keys`` of each image's tokens, rounded up."""
        images, keys = self.images, self.reduction.keys
        if isinstance(keys, int):
            return images.op("Min", [counts, images.constant([keys], "keys")], "key_count")
        share = ("keys", keys.numerator), ("per", keys.denominator)
        said = [images.constant([number], name) for name, number in share]
        (count,) = images.call("VtrBudget", [counts, *said], ["key_count"], ceil=1)
        return count
