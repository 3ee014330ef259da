"""Which methods are compared, and the schedule of each that leaves a share of the tokens.

A share is the mean over the decoder's layers of the vision tokens that enter them, by all there
are: what the literature's tables call 192, 128 or 64 tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import isqrt, sqrt
from typing import Any, Final, Literal

from vtr_export.errors import InputError
from vtr_export.families import ModelFacts, tower_of
from vtr_export.keeps import write_keep
from vtr_export.reductions.registry import VISION
from vtr_export.schedule import Schedule
from vtr_export.search.budget import Budget
from vtr_export.search.candidate import Score, Space
from vtr_export.search.curves import BISECTIONS, Curve, Linear, Pyramid, Sigmoid, solve

Data = dict[str, Any]
Vision = Callable[[int, ModelFacts], Data]
Prefill = Callable[[float, ModelFacts], Data]
Phase = Literal["none", "vision", "prefill", "both"]
SHARES: Final = (0.5, 0.25, 0.125)
STEEPNESS: Final = 2.0  # of the sigmoid, a layer; near what P-Sigmoid finds on the digits sample
RANKED: Final = {"from": "next", "query": "text", "heads": "max"}  # what its searches chose


@dataclass(frozen=True)
class Method:
    """A row: reductions before the decoder, cuts inside, and what becomes of the cache.

    ``own``: how many tokens are left is the image's business, and no share is asked.
    """

    name: str
    vision: Vision | None = None
    prefill: Prefill | None = None
    decode: str = ""
    own: bool = False

    @property
    def phase(self) -> Phase:
        """Where tokens go."""
        if self.vision and self.prefill:
            return "both"
        return "vision" if self.vision else "prefill" if self.prefill else "none"

    def schedule(self, share: float, facts: ModelFacts) -> Schedule:
        """The schedule that leaves ``share``; one for both phases takes its root twice.

        InputError where no schedule of the method leaves so little, ScheduleError where the
        language does not have it.
        """
        data: Data = {"version": 1, "origin": {"method": self.name, "share": share}}
        if self.vision:
            tokens = _tokens(facts)
            wanted = max(1, round((sqrt(share) if self.prefill else share) * tokens))
            data["vision"] = (self.vision(wanted, facts),)
            left = _left(data["vision"][0], facts)
            share, facts = share * tokens / left, replace(facts, tokens_per_image=left)
            if self.prefill and share > 0.99 and not self.own:
                raise InputError(
                    f"{left} of {tokens} tokens before the decoder leave nothing to do inside it",
                    hint="ask for fewer",
                )
        if self.prefill:
            data["prefill"] = self.prefill(share, facts)
        if self.decode:
            data["decode"] = ({"method": self.decode},)
        return Schedule.from_data(data)


def _tokens(facts: ModelFacts) -> int:
    """Of an image."""
    if facts.tokens_per_image is None:
        raise InputError(
            "an image's tokens depend on its size, and shares of them are compared",
            hint="compare on a model that gives every image the same number of tokens",
        )
    return facts.tokens_per_image


# --- before the decoder ------------------------------------------------------------------------


def _left(entry: Data, facts: ModelFacts) -> int:
    """Tokens that one leaves of an image, at most."""
    tower = tower_of(facts)
    if tower is None:
        raise InputError(
            "this model's images are not one square of tokens, projected one by one",
            hint="compare what works inside the decoder: --method",
        )
    return max(1, VISION[entry["method"]].model_validate(entry).count(tower))


def _kept(method: str, **options: Any) -> Vision:
    """A reduction whose ``keep`` is the number of tokens."""
    return lambda left, _: {"method": method, "keep": left, **options}


def _solved_by(make: Callable[[int], Data], most: Callable[[int], int]) -> Vision:
    """A reduction with a number from 1 to ``most`` of the tokens: the one that leaves ``left``.

    Or nearly so many, and rather fewer.
    """

    def vision(left: int, facts: ModelFacts) -> Data:
        entries = [make(number) for number in range(1, most(_tokens(facts)) + 1)]
        counts = {number: _left(entry, facts) for number, entry in enumerate(entries)}
        fewer = {number: count for number, count in counts.items() if count <= left}
        if not fewer:
            raise InputError(
                f"{entries[0]['method']} leaves {min(counts.values())} tokens at least, not {left}",
                hint="ask for more",
            )
        return entries[max(fewer, key=lambda number: fewer[number])]

    return vision


def _same(entry: Data) -> Vision:
    """One whose numbers are not ours to choose."""
    return lambda *_: entry


def _ratio(method: str) -> Vision:
    """PruMerge's static form: so many of the tokens stand out."""
    return lambda left, facts: _solved_by(
        lambda best: {"method": method, "ratio": write_keep(Fraction(best, _tokens(facts)))},
        lambda tokens: tokens,
    )(left, facts)


def _visionzip(left: int, _: ModelFacts) -> Data:
    """In the published proportion, 54 to 10."""
    contextual = max(1, round(left * 10 / 64))
    return {"method": "visionzip", "dominant": left - contextual, "contextual": contextual}


def _pool(kind: str) -> Vision:
    """Windows that fill the grid, as near to squares as there are for so few tokens."""

    def vision(left: int, facts: ModelFacts) -> Data:
        rows = isqrt(_tokens(facts))
        sides = [side for side in range(1, rows + 1) if rows % side == 0]
        grids = [(a, b) for a in sides for b in sides if b <= a and a * b <= left]
        grid = max(grids, key=lambda one: (one[0] * one[1], one[1]))
        return {"method": "pool", "kind": kind, "grid": grid}

    return vision


def _mustdrop(left: int, facts: ModelFacts) -> Data:
    """So many windows of 3 by 3 merge as leave the number; the adaptive form has its own."""
    windows = -(-(_tokens(facts) - left) // 8)
    return {"method": "mustdrop", "windows": min(windows, (isqrt(_tokens(facts)) // 3) ** 2)}


def _ficoco_v(left: int, facts: ModelFacts) -> Data:
    """In the layers behind the tower's middle, as published."""
    tower = tower_of(facts)
    layers = 0 if tower is None else tower.layers_run - tower.layers // 2
    return {"method": "ficoco_v", "each": (_tokens(facts) - left) // max(1, layers)}


# --- inside the decoder ------------------------------------------------------------------------


def _list(curve: Curve, score: Data, **options: Any) -> Prefill:
    """A keep a layer: the curve whose mean is the share."""

    def prefill(share: float, facts: ModelFacts) -> Data:
        budget = Budget(f"{share:.3g} of the tokens", share, lambda candidate: candidate.mean_keep)
        keeps = solve(curve, Space(facts), Score(), budget).candidate.keeps
        return _each(keeps, share, facts, score, options)

    return prefill


def _sigmoid(score: Data, **options: Any) -> Prefill:
    """A list of the shape that searches find, with as few cuts: from all to none in few layers.

    Eighths of the tokens, so that no cut drops one or two; what is missing from the share stays
    longest where most go.
    """

    def prefill(share: float, facts: ModelFacts) -> Data:
        tokens, curve = _tokens(facts), Sigmoid(0.0, STEEPNESS)
        low, high = curve.limits(facts.layers)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            fits = sum(_eighths(curve, middle, facts)) <= share * tokens * facts.layers
            low, high = (middle, high) if fits else (low, middle)
        keeps = _eighths(curve, low, facts)
        layer = next((i for i, keep in enumerate(keeps) if keep < tokens), None)
        if layer is not None:
            missing = max(0, int(share * tokens * facts.layers) - sum(keeps))
            keeps[layer] = min(tokens, keeps[layer] + missing)
        return _each(keeps, share, facts, score, options)

    return prefill


def _eighths(curve: Curve, value: float, facts: ModelFacts) -> list[int]:
    tokens = _tokens(facts)
    shares = curve.shares(facts.layers, value)
    return [tokens, *(int(tokens * round(8 * share) / 8) for share in shares[1:])]


def _each(
    keeps: Sequence[int], share: float, facts: ModelFacts, score: Data, options: Data
) -> Data:
    """As a schedule has it; InputError where the first layer alone sees as much as the share."""
    if keeps[1] == 0 or sum(keeps) > share * _tokens(facts) * facts.layers + 1:
        raise _too_few(share, facts)
    return {"score": score, "keep": _shares(keeps, _tokens(facts)), **options}


def _thresholds(share: float, facts: ModelFacts) -> Data:
    """MustDrop's, published for 576 tokens: a token of fewer has a larger share of attention."""
    tokens = _tokens(facts)
    both = {"whole": min(1.0, 0.576 / tokens), "single": min(1.0, 0.576 / tokens)}
    listed = _staged((2, 6, 10, 14), 32, (300, 200, 150, 110), _TEXT, positions="repacked")
    return listed(share, facts) | {"threshold": both, "protect": "keys"}


def _too_few(share: float, facts: ModelFacts) -> InputError:
    return InputError(
        f"{share:.3g} of the tokens in {facts.layers} layers is what the first ones see already",
        hint="reduce before the decoder too",
    )


def _shares(keeps: Sequence[int], tokens: int) -> tuple[int | str, ...]:
    """As a schedule spells them, also where another image has another number of tokens."""
    return tuple(write_keep(Fraction(keep, tokens)) for keep in keeps)


def _fastv(share: float, facts: ModelFacts) -> Data:
    """One cut, before layer 2 where that reaches the share, else before layer 1."""
    layer, tokens = 2 if share > 2 / facts.layers else 1, _tokens(facts)
    keep = int((share * facts.layers - layer) / (facts.layers - layer) * tokens)
    if keep < 1:
        raise _too_few(share, facts)
    return {"stages": ({"before_layer": layer, "keep": _shares([keep], tokens)[0]},)}


def _pyramid(score: Data, **options: Any) -> Prefill:
    """Four equal runs of layers where they reach the share, else a run a layer."""

    def prefill(share: float, facts: ModelFacts) -> Data:
        parts = 4 if share > 1 / 4 else facts.layers
        return _list(Pyramid(parts), score, **options)(share, facts)

    return prefill


def _vtw(share: float, facts: ModelFacts) -> Data:
    """All tokens, then none."""
    layer = round(share * facts.layers)
    if layer < 1:
        raise _too_few(share, facts)
    return {"stages": ({"before_layer": layer, "keep": 0},)}


def _staged(
    layers: Sequence[int], of: int, ratios: Sequence[int], score: Data, **options: Any
) -> Prefill:
    """Stages behind ``layers`` of a decoder of ``of`` that keep in these ratios."""

    def prefill(share: float, facts: ModelFacts) -> Data:
        count, tokens = facts.layers, _tokens(facts)
        firsts = _firsts([round((layer + 1) * count / of) for layer in layers], count)
        runs = [after - first for first, after in zip(firsts, [*firsts[1:], count], strict=True)]
        wanted = share * count - firsts[0]  # layers' worth of tokens behind the first cut
        if wanted * tokens < 1:
            raise _too_few(share, facts)
        scale = wanted / sum(run * ratio for run, ratio in zip(runs, ratios, strict=True))
        keeps = [min(tokens, int(scale * ratio * tokens)) for ratio in ratios]
        stages = zip(firsts, _shares(keeps, tokens), strict=True)
        listed = tuple({"before_layer": first, "keep": keep} for first, keep in stages)
        return {"score": score, "stages": listed, **options}

    return prefill


def _firsts(layers: Sequence[int], count: int) -> list[int]:
    """Layers from 1 on, each once."""
    found: list[int] = []
    for layer in layers:
        found.append(max(layer, found[-1] + 1 if found else 1))
    if found[-1] >= count:
        raise InputError(
            f"{len(layers)} cuts in {count} layers", hint="compare on a model with more layers"
        )
    return found


_SPARSE: Final = ((2, 6, 15), 32, (300, 200, 110))  # its list for 192 tokens
_PLUS: Final = _ratio("prumerge+")
_LIST: Final = _sigmoid(RANKED)
_TEXT: Final = {"query": "text"}
_RATED: Final = _staged(
    *_SPARSE, {"query": "raters"}, positions="repacked", merge={"by": "recycle"}
)
_PRODUCT: Final = _sigmoid(
    {"rule": "self_cross", "query": "text", "heads": "max"}, drop_point="inside"
)
_CORRELATED: Final = _list(
    Linear(),
    {"rule": "redundancy", "query": "text"},
    positions="repacked",
    drop_point="attended",
    merge={"by": "correlate"},
)
_LISTED: Final = (
    Method("FasterVLM", _kept("fastervlm")),
    Method("PruMerge", _ratio("prumerge")),
    Method("PruMerge, adaptive", _same({"method": "prumerge"}), own=True),
    Method("PruMerge+", _PLUS),
    Method("PruMerge+, adaptive", _same({"method": "prumerge+"}), own=True),
    Method("VisionZip", _visionzip),
    Method("VisPruner", _kept("vispruner")),
    Method("DivPrune", _kept("divprune")),
    Method("FiCoCo-V", _ficoco_v),
    Method("FocusLLaVA sampler", _same({"method": "focusllava"}), own=True),
    Method("MustDrop windows", _mustdrop),
    Method("pixel shuffle", _same({"method": "pixel_shuffle"}), own=True),
    Method("pool, average", _pool("average")),
    Method("pool, max", _pool("max")),
    Method("pool, bilinear", _pool("bilinear")),
    Method("FastV", prefill=_fastv),
    Method("PyramidDrop", prefill=_pyramid({"from": "next"}, positions="repacked")),
    Method("FocusLLaVA text", prefill=_pyramid(_TEXT)),
    Method("VTW", prefill=_vtw),
    Method("P-Sigmoid list", prefill=_LIST),
    Method("SparseVLM", prefill=_RATED),
    Method("SparseVLM+", prefill=_staged(*_SPARSE, {"query": "raters"})),
    Method("FitPrune", prefill=_PRODUCT),
    Method("FiCoCo-L", prefill=_CORRELATED),
    Method("MustDrop", _mustdrop, _thresholds, "mustdrop"),
    Method("MustDrop, adaptive", _same({"method": "mustdrop"}), _thresholds, "mustdrop", own=True),
    Method("FiCoCo-VL", _ficoco_v, _CORRELATED),
    Method("FasterVLM & list", _kept("fastervlm"), _LIST),
    Method("PruMerge+ & list", _PLUS, _LIST),
    Method("PruMerge+ & list & cache", _PLUS, _LIST, "mustdrop"),
    Method("VisionZip & list", _visionzip, _LIST),
    Method("DivPrune & list", _kept("divprune"), _LIST),
    Method("pool & list", _pool("average"), _LIST),
    Method("pool & list & cache", _pool("average"), _LIST, "mustdrop"),
)
METHODS: Final[Mapping[str, Method]] = {method.name: method for method in _LISTED}
