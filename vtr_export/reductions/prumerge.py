"""PruMerge and PruMerge+: the tokens that stand out, and what their kin weigh."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from vtr_export.keeps import MAX_PART, read_share, refuse, write_keep
from vtr_export.reductions.reduction import Form, VisionReduction
from vtr_export.reductions.tokens import Tokens
from vtr_export.schedule_yaml import show

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtr_export.reductions.tokens import Images
    from vtr_export.reductions.tower import Tower

NEAREST: Final = 32  # other tokens that each kept one takes up, as published for inference
LAYER: Final = -1  # whose queries and keys: the tower's last


def _read_ratio(value: object) -> Fraction | None:
    """A share of the tokens, and some; None: outliers."""
    if value is None:
        return None
    ratio = read_share(value) if isinstance(value, str) else value
    if not isinstance(ratio, Fraction) or ratio.denominator > MAX_PART or not 0 < ratio <= 1:
        message = f"ratio is {show(value)}, not a share of the tokens"
        raise refuse(message, "write 12.5% or 1/8, or leave ratio out")
    return ratio


def _write_ratio(ratio: Fraction | None) -> int | str | None:
    """As ``_read_ratio`` reads it."""
    return None if ratio is None else write_keep(ratio)


Ratio = Annotated[
    Fraction | None,
    PlainValidator(_read_ratio),
    PlainSerializer(_write_ratio),
    WithJsonSchema(
        {
            "description": "The share of the tokens that stand out; null: those far above most.",
            "type": ["string", "null"],
            "pattern": r"^[0-9]{1,9}((\.[0-9]{1,9})?%|/[0-9]{1,9})$",
        }
    ),
]


class PruMerge(VisionReduction):
    """Tokens that the class token looks at most, best first, each with its nearest by key; a rest.

    arXiv 2403.15388 and its code. ``c`` is the class token's row of one softmax over the whole
    width of the last layer's queries and keys. A kept token becomes ``x_i + sum c_j x_j`` over the
    32 others of nearest key (not divided by the weights, as in the code), and one token behind them
    is ``sum c_j x_j`` of all that went.

    Data-dependent without ``ratio``: as many as have c above ``Q3 + 1.5 IQR``, 1 at least, told
    for each image alone (the code's evaluation asks the whole batch). Static with it: the share
    ``ratio``, rounded down, 1 at least. Where there is no class token, c is what all patches give;
    where a token covers several patches, the mean of their c and keys: both are ours.
    """

    PAPER: ClassVar[str] = "2403.15388"
    STATIC_FORM: ClassVar[str] = "ratio: 1/8 (any share)"
    MERGES: ClassVar[bool] = True
    method: Literal["prumerge"] = "prumerge"
    ratio: Ratio = None

    @property
    def form(self) -> Form:
        """Static where a ratio says how many."""
        return "data-dependent" if self.ratio is None else "static"

    def misfit(self, tower: Tower) -> tuple[str, str] | None:
        """Every token must still have its key."""
        if tower.is_whole:
            return None
        return f"{self.method} compares the keys of all tokens, and some are gone", "list it first"

    def count(self, tower: Tower) -> int:
        """Those that stand out and the rest's; of the data-dependent form, at most."""
        return self._slots(tower.grid.tokens) + 1

    def flops(self, tower: Tower) -> int:
        """Scores, keys compared, sums; and what runs of the tower only to ask its last layer."""
        kept, tokens = self._slots(tower.grid.tokens), tower.grid.tokens
        rows = 1 if tower.has_cls else tower.sequence
        score = 2 * rows * tower.sequence * tower.hidden
        compared = 2 * kept * tokens * tower.hidden
        summed = 2 * (kept + 1) * tokens * tower.width
        return tower.last_layer_flops + score + compared + summed

    def reduce(self, images: Images) -> Tokens:
        """Score, choose, merge."""
        score, keys = _score_and_keys(images)
        source, counts = self._choose(images, score)
        nearest = images.constant([min(NEAREST, images.tower.grid.tokens - 1)], "nearest")
        given = [images.features, keys, score, source, nearest]
        (merged,) = images.call("VtrNearestSum", given, ["merged"])
        given = [images.features, score, source, counts]
        (rest,) = images.call("VtrRestSum", given, ["rest"])
        (features,) = images.call("VtrAppend", [merged, rest, counts], ["features"])
        (sources,) = images.call("VtrSources", [source, counts], ["sources"])
        if self.ratio is not None:
            return Tokens(features, source=sources)
        one = images.constant([1], "rest_token")
        return Tokens(features, images.op("Add", [counts, one], "counts"), sources)

    def _slots(self, tokens: int) -> int:
        """Places for kept tokens: no more than a quarter lies beyond the bound."""
        return max(1, tokens // 4) if self.ratio is None else _best(self.ratio, tokens)

    def _choose(self, images: Images, score: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Tokens, best first ``[I,K]``, and how many of them count ``[I]`` or ``[1]``."""
        slots = images.constant([self._slots(images.tower.grid.tokens)], "slots")
        (source,) = images.call("VtrTopOrder", [score, slots], ["source"])
        return source, slots if self.ratio is not None else _outliers(images, score)


class PruMergePlus(PruMerge):
    """PruMerge, and tokens spread evenly over the image beside those that stand out.

    arXiv 2403.15388 and its code. Data-dependent: of k that stand out among N follow the tokens
    0, s, 2 s, … before the last that are not among them, ``s = int(int(N / k) / 3)``. Static, with
    ``ratio``, as its code trains: ``step / 2, step / 2 + step, …`` before the last, ``step =
    int(1 / ratio)``, whether or not they stand out: one that does comes twice, never takes itself
    up (in the code it does), and all that went are in the rest (the code loses as many as come
    twice).
    """

    method: Literal["prumerge+"] = "prumerge+"  # type: ignore[assignment]  # another word

    def _slots(self, tokens: int) -> int:
        if self.ratio is None:
            return tokens
        return _best(self.ratio, tokens) + len(_every(self.ratio, tokens))

    def _choose(self, images: Images, score: ir.Value) -> tuple[ir.Value, ir.Value]:
        tokens = images.tower.grid.tokens
        if self.ratio is not None:
            best = images.constant([_best(self.ratio, tokens)], "best")
            (order,) = images.call("VtrTopOrder", [score, best], ["order"])
            every = images.constant(_every(self.ratio, tokens), "every")
            (source,) = images.call("VtrAlso", [order, every], ["source"])
            return source, images.constant([self._slots(tokens)], "slots")
        outliers = _outliers(images, score)
        step = images.op("Div", [images.constant([tokens], "tokens"), outliers], "step")
        third = images.op("Div", [step, images.constant([3], "three")], "third")
        stride = images.op("Max", [third, images.constant([1], "one")], "stride")
        found = images.call("VtrSpread", [score, outliers, stride], ["source", "kept"])
        return found[0], found[1]


def _best(ratio: Fraction, tokens: int) -> int:
    """How many stand out."""
    return max(1, tokens * ratio.numerator // ratio.denominator)


def _every(ratio: Fraction, tokens: int) -> range:
    """Tokens that stand for their neighbourhood."""
    step = ratio.denominator // ratio.numerator
    return range(step // 2, tokens - 1, step)


def _outliers(images: Images, score: ir.Value) -> ir.Value:
    """``[I]``: how many stand out, one at least."""
    (found,) = images.call("VtrOutliers", [score], ["found"])
    return images.op("Max", [found, images.constant([1], "least")], "outliers")


def _score_and_keys(images: Images) -> tuple[ir.Value, ir.Value]:
    """``[I,N]`` and ``[I,N,C]`` of the tokens: one softmax over the whole width, and its keys."""
    tower = images.tower
    (query,) = images.call("VtrWholeWidth", [images.query(LAYER)], ["query"])
    (key,) = images.call("VtrWholeWidth", [images.key(LAYER)], ["key"])
    operator = "VtrClassAttention" if tower.has_cls else "VtrReceivedAttention"
    (row,) = images.call(operator, [query, key], ["row"], scale=tower.hidden**-0.5)
    patches = tower.patches.tokens
    score = images.op("Reshape", [row, images.constant([0, patches], "flat")], "score")
    shape = images.constant([0, tower.sequence, tower.hidden], "by_row")
    every = images.op("Reshape", [key, shape], "every_key")
    (keys,) = images.call("VtrTail", [every, images.constant([patches], "patches")], ["keys"])
    return (score, keys) if tower.merge == 1 else _by_token(images, score, keys)


def _by_token(images: Images, score: ir.Value, keys: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Means over the patches of each token."""
    tower = images.tower
    grid = (tower.grid.rows, tower.merge, tower.grid.columns, tower.merge)
    (pooled,) = images.call("VtrPoolPatches", [score, images.constant(grid, "grid")], ["pooled"])
    shape = images.constant([0, *grid, tower.hidden], "windows_shape")
    windows = images.op("Reshape", [keys, shape], "windows")
    axes = images.constant([2, 4], "axes")
    means = images.op("ReduceMean", [windows, axes], "means", keepdims=0)
    flat = images.constant([0, tower.grid.tokens, tower.hidden], "tokens_shape")
    return pooled, images.op("Reshape", [means, flat], "token_keys")
