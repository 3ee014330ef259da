"""FiCoCo-V: in the tower's later layers, redundant tokens become part of those like them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from vtr_export.keeps import KeepValue, tokens_of
from vtr_export.reductions.reduction import VisionReduction
from vtr_export.reductions.tokens import Tokens

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtr_export.reductions.tokens import Images
    from vtr_export.reductions.tower import Tower

QUANTILE_STEP = 500  # of the paper's 0.998 quantile: a row as long has one value more above it


class FiCoCoV(VisionReduction):
    """Between attention and MLP of each layer from ``from_layer`` on, ``each`` tokens leave.

    arXiv 2411.17686, section 3. Filter: ``beta`` times what the class token's logits give a token,
    less ``1 - beta`` times what it asks of all tokens, both of length 1 over the tokens; in each
    window of 2 by 2 of the image's grid the lowest survivor counts half if above 0, twice if not;
    the lowest leave. Correlate: a token that leaves goes to the ``nearest`` kept ones by its row of
    logits, shared by their softmax. Compress: who receives shares of weight w is divided by 1 + w.

    Logits are the attention's before its softmax, mean over heads, and ``beta`` weighs the class
    token: as the published code; the paper says attention, and weighs the other way. Windows and
    shares follow the paper: the code forgets which tokens are left, and so mixes them up. The
    paper's 0.998 quantile leaves 1 token above it in a row of up to 500, 2 up to 1000, and so on:
    what ``nearest`` is if not given. Without a class token, its part is the negative cosine of a
    token's key and the mean key (appendix 10.2).
    """

    PAPER: ClassVar[str] = "2411.17686"
    method: Literal["ficoco_v"] = "ficoco_v"
    each: KeepValue = 42
    from_layer: int | None = Field(default=None, ge=0, description="Half the tower, if not given.")
    beta: float = Field(default=0.35, ge=0, le=1)
    nearest: int | None = Field(default=None, ge=0, description="Kept tokens that get each.")

    def layers(self, tower: Tower) -> range:
        """Those that drop tokens: no layer behind the features does."""
        start = tower.layers // 2 if self.from_layer is None else self.from_layer
        return range(start, tower.layers_run)

    def drops(self, tower: Tower) -> int:
        """Tokens that leave in each layer."""
        return tokens_of(self.each, tower.patches.tokens)

    def misfit(self, tower: Tower) -> tuple[str, str] | None:
        """It needs layers to work in, tokens to leave, and an image's grid as it was."""
        layers, drops, tokens = self.layers(tower), self.drops(tower), tower.patches.tokens
        if tower.merge > 1:
            return (
                f"a token covers {tower.merge} by {tower.merge} patches, which must all be there",
                "choose a reduction behind the tower, as fastervlm",
            )
        if not tower.is_whole:
            return "it works inside the tower, on all tokens", "list it first"
        if not layers:
            return (
                f"no layer from {layers.start} on feeds the projector",
                f"from_layer at most {tower.layers_run - 1}",
            )
        if not 0 < drops * len(layers) < tokens:
            most = (tokens - 1) // len(layers)
            said = f"{drops} of {tokens} tokens in each of {len(layers)} layers"
            return f"{said} cannot leave", f"each: 1 to {most}, or another from_layer"
        return None

    def count(self, tower: Tower) -> int:
        """All tokens less ``each`` for every layer."""
        return tower.patches.tokens - self.drops(tower) * len(self.layers(tower))

    def receivers(self, kept: int) -> int:
        """Tokens out of ``kept`` that one dropped token goes to."""
        nearest = 1 + (kept - 1) // QUANTILE_STEP if self.nearest is None else self.nearest
        return min(nearest, kept)

    def flops(self, tower: Tower) -> int:
        """Filter and compress in every layer, less what fewer rows save in it and in later ones."""
        whole, width, drops = tower.sequence, tower.hidden, self.drops(tower)
        macs, rows = 0, whole
        for _ in self.layers(tower):
            before, rows = rows, rows - drops
            macs += 2 * before * width + 2 * drops * rows * width
            macs -= 4 * (whole - before) * width**2 + 2 * (whole**2 - before**2) * width
            macs -= 2 * (whole - rows) * width * tower.intermediate
        return 2 * macs

    def reduce(self, images: Images) -> Tokens:
        """Layer by layer; the features that come out are those of the survivors."""
        source: ir.Value | None = None
        left = images.tower.patches.tokens
        for layer in self.layers(images.tower):
            left -= self.drops(images.tower)
            source = _Layer(self, images, layer, left).narrow(source)
        return Tokens(images.features, source=source)


class _Layer:
    """One layer that ``left`` tokens leave."""

    def __init__(self, reduction: FiCoCoV, images: Images, layer: int, left: int) -> None:
        self.reduction, self.images, self.layer, self.left = reduction, images, layer, left
        self.stream = images.attended(layer)
        self.query, self.key = images.query(layer), images.key(layer)

    def narrow(self, source: ir.Value | None) -> ir.Value:
        """Drop, share, and give the MLP what is left; which of the image's tokens that is."""
        score = self._filtered()
        if source is None:
            (source,) = self._call("VtrColumns", [score], ["columns"])
        tower = self.images.tower
        grid = self._constant([tower.patches.rows, tower.patches.columns], "grid")
        (score,) = self._call("VtrWindowPenalty", [score, source, grid], ["penalized"])
        keep = self._constant([self.left], "keep")
        kept, dropped = self._call("VtrSplitTokens", [score, keep], ["kept", "dropped"])
        self.images.replace(self.stream, self._compressed(kept, dropped))
        (survivors,) = self._call("VtrNarrow", [source, kept], ["source"])
        return survivors

    def _filtered(self) -> ir.Value:
        """``[I,N]``: low is redundant."""
        of_class = self.images.tower.has_cls
        operator = "VtrClassRedundancy" if of_class else "VtrKeyRedundancy"
        measured = self._call(operator, [self.query, self.key], ["important", "redundant"])
        (score,) = self._call("VtrWeighUnits", measured, ["score"], beta=self.reduction.beta)
        return score

    def _compressed(self, kept: ir.Value, dropped: ir.Value) -> ir.Value:
        """The stream's rows that are left, the class token first as it was."""
        tower, nearest = self.images.tower, self.reduction.receivers(self.left)
        rows, others = self._row(kept, "kept_rows"), self._row(dropped, "dropped_rows")
        (stream,) = self._call("VtrNarrow", [self.stream, rows], ["left"])
        if nearest:
            (gone,) = self._call("VtrNarrow", [self.stream, others], ["gone"])
            scale = self.images.scale(self.layer)
            asked = [self.query, self.key, others, rows]
            (logits,) = self._call("VtrHeadLogits", asked, ["logits"], scale=scale)
            count = self._constant([nearest], "nearest")
            (stream,) = self._call("VtrSelfPreserve", [stream, gone, logits, count], ["filled"])
        if not tower.has_cls:
            return stream
        start, one = self._constant([0], "start"), self._constant([1], "one")
        first = self.images.op("Slice", [self.stream, start, one, one], self._name("class"))
        return self.images.op("Concat", [first, stream], self._name("narrowed"), axis=1)

    def _row(self, tokens: ir.Value, name: str) -> ir.Value:
        """Where tokens stand in the stream."""
        if not self.images.tower.has_cls:
            return tokens
        return self.images.op("Add", [tokens, self._constant([1], f"{name}_1")], self._name(name))

    def _name(self, name: str) -> str:
        return f"layer_{self.layer}.{name}"

    def _constant(self, values: list[int], name: str) -> ir.Value:
        return self.images.constant(values, self._name(name))

    def _call(
        self, operator: str, inputs: list[ir.Value], names: list[str], **attributes: float
    ) -> list[ir.Value]:
        own = [self._name(name) for name in names]
        return list(self.images.call(operator, inputs, own, **attributes))
