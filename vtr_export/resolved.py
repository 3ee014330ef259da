"""A schedule fitted to one model: what compiler, reference and costs work with."""

from dataclasses import dataclass
from typing import Literal

from vtr_export.reductions import Tower
from vtr_export.reductions.registry import Decode, Vision
from vtr_export.schedule_document import Correlate, Recycle, Threshold

Rounding = Literal["floor", "ceil"]


@dataclass(frozen=True)
class Keep:
    """``numerator/denominator`` of the vision tokens, rounded; computed in integers."""

    numerator: int
    denominator: int
    rounding: Rounding = "floor"

    def of(self, v: int) -> int:
        """How many of ``v`` tokens survive: never more than ``v``."""
        up = self.denominator - 1 if self.rounding == "ceil" else 0
        return min(v, (v * self.numerator + up) // self.denominator)


@dataclass(frozen=True)
class Cut:
    """Before decoder layer ``before_layer``, ``keep`` of the call's vision tokens survive."""

    before_layer: int
    keep: Keep


@dataclass(frozen=True)
class Resolved:
    """A schedule fitted to one model: cuts by ascending layer, keeps never growing.

    With a fixed number N of tokens per image every keep is k/N, so that each image of a call
    contributes exactly k; otherwise a keep is a share of the call's tokens. Where layers
    ``crosses`` attend to images as keys, these are narrowed, and each cut has a cross layer of its
    own that scores it.
    """

    layers: int
    tokens_per_image: int | None
    cuts: tuple[Cut, ...]
    source: Literal["previous", "next"] = "previous"
    query: Literal["last", "text", "raters"] = "last"
    heads: Literal["mean", "max"] = "mean"
    rank: Literal["joint", "per_image"] = "joint"
    positions: Literal["original", "repacked"] = "original"
    drop_point: Literal["between", "inside", "attended"] = "between"
    crosses: tuple[int, ...] = ()
    rule: Literal["attention", "self_cross", "redundancy"] = "attention"
    threshold: Threshold | None = None
    protect: bool = False
    merge: Recycle | Correlate | None = None
    vision: tuple[Vision, ...] = ()
    decode: tuple[Decode, ...] = ()
    tower: Tower | None = None

    @property
    def asks_all(self) -> bool:
        """Whether a cut looks at the attention of all vision rows, not only at text's."""
        return self.rule != "attention" or isinstance(self.merge, Correlate)

    @property
    def is_static(self) -> bool:
        """Whether every image gives as many tokens as the schedule says."""
        return all(reduction.form == "static" for reduction in self.vision)

    @property
    def tokens_left(self) -> int:
        """Tokens of an image, or a tile, behind the vision part; at most, if it is not static."""
        tower = self.tower
        assert tower is not None, "there is a vision part"
        for reduction in self.vision:
            tower = reduction.leaves(tower)
        return tower.grid.tokens

    def entering(self, tokens: int) -> int:
        """Of ``tokens`` that a vision encoder would give, how many reach the decoder at most."""
        if self.tower is None:
            return tokens
        return tokens // self.tower.grid.tokens * self.tokens_left

    @property
    def is_fusible(self) -> bool:
        """Whether a plugin may stand for its cuts: they rank by attention and drop, no more."""
        ranks = self.rule == "attention" and self.query != "raters" and self.threshold is None
        return ranks and not self.protect and self.merge is None

    @property
    def compacts(self) -> bool:
        """Whether caches are narrowed behind a prefill: those between two cuts."""
        return bool(self.decode) and len(self.cuts) > 1

    def keep_per_layer(self, v: int) -> tuple[int, ...]:
        """Vision tokens entering each decoder layer when the call brings ``v``.

        At most, with a threshold.
        """
        tokens, behind = [v] * self.layers, self.behind_cuts(v)
        for cut, left in zip(self.cuts, behind, strict=True):
            tokens[cut.before_layer :] = [left] * (self.layers - cut.before_layer)
        return tuple(tokens)

    def behind_cuts(self, v: int) -> tuple[int, ...]:
        """Vision tokens behind each cut when the call brings ``v``: kept, and made of dropped."""
        left = [v]
        for cut in self.cuts:
            made = 0
            if isinstance(self.merge, Recycle):
                _, made = self.merge.of(left[-1] - cut.keep.of(v))
            left.append(cut.keep.of(v) + made)
        return tuple(left[1:])
