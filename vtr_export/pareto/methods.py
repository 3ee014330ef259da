"""Which methods are compared, and the schedule of each that leaves a share of the tokens.

A share is the mean over the decoder's layers of the vision tokens that enter them, by all there
are: what the literature's tables call 192, 128 or 64 tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import sqrt
from typing import Any, Final, Literal

from vtr_export.errors import InputError
from vtr_export.families import ModelFacts
from vtr_export.keeps import write_keep
from vtr_export.schedule import Schedule
from vtr_export.search.budget import Budget
from vtr_export.search.candidate import Candidate, Score, Space
from vtr_export.search.curves import Curve, FastV, Linear, Pyramid, Sigmoid, solve

Data = dict[str, Any]
Vision = Callable[[int, ModelFacts], Sequence[Data]]
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
            left = max(1, round((sqrt(share) if self.prefill else share) * tokens))
            data["vision"] = tuple(self.vision(left, facts))
            share, facts = share * tokens / left, replace(facts, tokens_per_image=left)
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


def _kept(method: str, **options: Any) -> Vision:
    """A reduction whose ``keep`` is the number of tokens."""
    return lambda keep, _: [{"method": method, "keep": keep, **options}]


# --- inside the decoder ------------------------------------------------------------------------


def _list(curve: Curve, score: Data, **options: Any) -> Prefill:
    """A keep a layer: the curve whose mean is the share."""

    def prefill(share: float, facts: ModelFacts) -> Data:
        keeps = _solved(curve, share, facts).keeps
        return {"score": score, "keep": _shares(keeps, _tokens(facts)), **options}

    return prefill


def _solved(curve: Curve, share: float, facts: ModelFacts) -> Candidate:
    """The curve at a mean share; InputError where the first layer alone sees as much."""
    budget = Budget(f"{share:.3g} of the tokens", share, lambda candidate: candidate.mean_keep)
    candidate = solve(curve, Space(facts), Score(), budget).candidate
    if candidate.keeps[1] == 0:
        raise _too_few(share, facts)
    return candidate


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
    layer = 2 if share > 2 / facts.layers else 1
    return _list(FastV(layer), {"from": "previous", "query": "last"})(share, facts)


def _pyramid(share: float, facts: ModelFacts) -> Data:
    """Four equal runs of layers where they reach the share, else a run a layer."""
    parts = 4 if share > 1 / 4 else facts.layers
    score = {"from": "next", "query": "last"}
    return _list(Pyramid(parts), score, positions="repacked")(share, facts)


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


_TEXT: Final = {"query": "text"}
_LIST: Final = _list(Sigmoid(0.0, STEEPNESS), RANKED)
_SPARSE: Final = ((2, 6, 15), 32, (300, 200, 110))  # its list for 192 tokens
METHODS: Final[Mapping[str, Method]] = {
    method.name: method
    for method in (
        Method("FasterVLM", _kept("fastervlm")),
        Method("FastV", prefill=_fastv),
        Method("PyramidDrop", prefill=_pyramid),
        Method("VTW", prefill=_vtw),
        Method("P-Sigmoid list", prefill=_LIST),
        Method(
            "SparseVLM",
            prefill=_staged(*_SPARSE, {"query": "raters"}, positions="repacked",
                            merge={"by": "recycle"}),
        ),
        Method("SparseVLM+", prefill=_staged(*_SPARSE, _TEXT)),
        Method(
            "FitPrune",
            prefill=_list(Sigmoid(0.0, STEEPNESS), {"rule": "self_cross", "query": "text",
                          "heads": "max"}, drop_point="inside"),
        ),
        Method(
            "FiCoCo-L",
            prefill=_list(Linear(), {"rule": "redundancy"}, drop_point="attended",
                          merge={"by": "correlate"}),
        ),
        Method("FasterVLM, then list", _kept("fastervlm"), _LIST),
    )
}  # fmt: skip
