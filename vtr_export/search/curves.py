"""Families of keep-per-layer curves; one parameter of each is solved so that a budget is met."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from vtr_export.errors import InputError
from vtr_export.search.budget import Budget
from vtr_export.search.candidate import Candidate, Score, Space

Floats = NDArray[np.float64]
SATURATED: Final = 40.0  # |x| from which a sigmoid is 0 or 1 to double precision's eye
BISECTIONS: Final = 64
NOISE: Final = 1e-9  # of a token: a share of 71.9999999999 tokens is 72


class Curve(Protocol):
    """The share of the vision tokens that enters each layer, but for one parameter.

    Costs must not fall as the parameter moves from ``limits(layers)[0]`` to ``[1]``.
    """

    family: ClassVar[str]
    solved: ClassVar[str]  # the name of that parameter

    def limits(self, layers: int) -> tuple[float, float]:
        """The parameter where the curve is lowest, and where it is highest."""
        ...

    def shares(self, layers: int, value: float) -> Floats:
        """``[layers]`` in 0 … 1, never growing; layer 0 gets everything whatever stands there."""
        ...


@dataclass(frozen=True)
class Sigmoid:
    """P-Sigmoid: ``clip(floor + (1 - floor) sigmoid(gamma (c - l)))`` of the tokens enter layer l.

    The form is ours: the paper's own (arXiv 2412.00556) could not be read. ``floor`` is what the
    deepest layers keep, ``gamma`` the steepness; solved is ``c``, the layer half-way down.
    """

    floor: float
    gamma: float
    family: ClassVar[str] = "sigmoid"
    solved: ClassVar[str] = "c"

    def limits(self, layers: int) -> tuple[float, float]:
        """So far left or right that the curve is flat."""
        return -SATURATED / self.gamma, layers + SATURATED / self.gamma

    def shares(self, layers: int, value: float) -> Floats:
        """See :class:`Curve`."""
        x = self.gamma * (value - np.arange(layers))
        sigmoid = 0.5 * (1 + np.tanh(x / 2))
        return np.clip(self.floor + (1 - self.floor) * sigmoid, 0, 1)


@dataclass(frozen=True)
class FastV:
    """One cut, before layer ``k``; solved is the share that it keeps (arXiv 2403.06764)."""

    k: int
    family: ClassVar[str] = "fastv"
    solved: ClassVar[str] = "keep"

    def limits(self, layers: int) -> tuple[float, float]:
        """Nothing to everything."""
        return 0.0, 1.0

    def shares(self, layers: int, value: float) -> Floats:
        """See :class:`Curve`."""
        return np.where(np.arange(layers) < self.k, 1.0, value)


@dataclass(frozen=True)
class Pyramid:
    """PyramidDrop: ``parts`` equal runs of layers, run i keeps λ^i; solved is λ (2410.17247)."""

    parts: int
    family: ClassVar[str] = "pyramid"
    solved: ClassVar[str] = "lambda"

    def limits(self, layers: int) -> tuple[float, float]:
        """Nothing to everything."""
        return 0.0, 1.0

    def shares(self, layers: int, value: float) -> Floats:
        """See :class:`Curve`; run i begins with layer ``layers * i // parts``."""
        firsts = [layers * i // self.parts for i in range(1, self.parts)]
        runs = np.searchsorted(firsts, np.arange(layers), side="right")
        powers: Floats = np.power(value, runs)
        return powers


@dataclass(frozen=True)
class Linear:
    """``1 - slope l``, never below 0; solved is the slope."""

    family: ClassVar[str] = "linear"
    solved: ClassVar[str] = "slope"

    def limits(self, layers: int) -> tuple[float, float]:
        """Nothing after layer 0, or everything."""
        return 1.0, 0.0

    def shares(self, layers: int, value: float) -> Floats:
        """See :class:`Curve`."""
        line: Floats = np.maximum(1 - value * np.arange(layers), 0)
        return line


@dataclass(frozen=True)
class Exponential:
    """``ratio^l``; solved is the ratio."""

    family: ClassVar[str] = "exponential"
    solved: ClassVar[str] = "ratio"

    def limits(self, layers: int) -> tuple[float, float]:
        """Nothing after layer 0, or everything."""
        return 0.0, 1.0

    def shares(self, layers: int, value: float) -> Floats:
        """See :class:`Curve`."""
        powers: Floats = np.power(value, np.arange(layers))
        return powers


@dataclass(frozen=True)
class Random:
    """Shares drawn uniformly, sorted, and scaled; solved is the scale (1 at most is kept)."""

    seed: int
    family: ClassVar[str] = "random"
    solved: ClassVar[str] = "scale"

    def limits(self, layers: int) -> tuple[float, float]:
        """Nothing, or everything."""
        return 0.0, 1 / float(self._drawn(layers)[-1])

    def shares(self, layers: int, value: float) -> Floats:
        """See :class:`Curve`."""
        return np.minimum(value * self._drawn(layers), 1)

    def _drawn(self, layers: int) -> Floats:
        """In (0, 1], descending."""
        return np.sort(1 - np.random.default_rng(self.seed).random(layers))[::-1]


CURVES: Final[Mapping[str, type[Curve]]] = {
    kind.family: kind for kind in (Sigmoid, FastV, Pyramid, Linear, Exponential, Random)
}


def describe(curve: Curve) -> dict[str, Any]:
    """Family and free parameters, as plain values."""
    return {"family": curve.family, **asdict(curve)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Solved:
    """A curve that meets a budget: ``value`` of its solved parameter, its integers, their cost."""

    curve: Curve
    value: float
    candidate: Candidate
    cost: float  # as a fraction of the unpruned model's

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **describe(self.curve),
            self.curve.solved: self.value,
            "keeps": list(self.candidate.keeps),
            "parts": self.candidate.parts,
            "score": self.candidate.score.to_data(),
            "cost": self.cost,
        }


def candidate_at(
    curve: Curve, value: float, space: Space, score: Score, closed: frozenset[int] = frozenset()
) -> Candidate:
    """The curve's tokens at each layer, rounded down; there is no cut before ``closed`` layers."""
    shares = np.minimum.accumulate(curve.shares(space.layers, value))
    keeps = np.floor(shares * space.parts + NOISE).astype(int).tolist()
    keeps[0] = space.parts
    for layer in sorted(closed):
        keeps[layer] = keeps[layer - 1]
    return Candidate(tuple(keeps), score, space.parts)


def solve(curve: Curve, space: Space, score: Score, budget: Budget) -> Solved:
    """The curve at a budget: never above it, and no layer could keep one more token below it.

    Bisection finds the parameter, rounded down to tokens. Cuts that cost more than they drop are
    left out, and it is found again without them; then tokens are given back, where rounding took
    most first. Raises InputError, with what the family reaches, if the budget is out of reach.
    """
    _check_reach(curve, space, score, budget)
    closed = frozenset[int]()
    while True:
        value = _bisect(curve, space, score, budget, closed)
        candidate = candidate_at(curve, value, space, score, closed)
        wasteful = _wasteful(candidate, budget)
        if not wasteful:
            break
        closed |= wasteful
    wanted = np.minimum.accumulate(curve.shares(space.layers, value)) * space.parts
    candidate = _top_up(candidate, wanted, budget)
    return Solved(curve, value, candidate, budget.cost(candidate))


def _bisect(
    curve: Curve, space: Space, score: Score, budget: Budget, closed: frozenset[int]
) -> float:
    """The parameter nearest to the curve's highest that the budget allows."""
    low, high = curve.limits(space.layers)
    if budget.cost(candidate_at(curve, high, space, score, closed)) <= budget.target:
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if budget.cost(candidate_at(curve, middle, space, score, closed)) <= budget.target:
            low = middle
        else:
            high = middle
    return low


def _wasteful(candidate: Candidate, budget: Budget) -> frozenset[int]:
    """Layers of stages whose cut costs more than it drops, never of two stages in a row."""
    cost, layers, last = budget.cost(candidate), set[int](), candidate.parts
    for layer in candidate.cut_layers():
        keeps, level = candidate.keeps, candidate.keeps[layer]
        if keeps[layer - 1] == last and layer - 1 in layers:
            continue
        if budget.cost(without_cut(candidate, layer)) <= cost:
            layers |= {i for i, keep in enumerate(keeps) if keep == level}
            last = level
    return frozenset(layers)


def reach(curve: Curve, space: Space, score: Score, budget: Budget) -> tuple[float, float]:
    """Least and greatest cost of a family on this model, as fractions of the unpruned one's."""
    low, high = (
        budget.cost(candidate_at(curve, value, space, score))
        for value in curve.limits(space.layers)
    )
    return low, high


def _check_reach(curve: Curve, space: Space, score: Score, budget: Budget) -> None:
    least, most = reach(curve, space, score, budget)
    if budget.target < least:
        raise InputError(
            f"{budget.text} is {budget.target:.4g} of the unpruned model, but the "
            f"{curve.family} family costs {least:.4g} to {most:.4g}: layer 0 sees every token",
            hint=f"ask for {_up(least):.4g} or more",
        )
    if most < min(budget.target, 1.0):
        raise InputError(
            f"{budget.text} is {budget.target:.4g} of the unpruned model, more than the "
            f"{least:.4g} to {most:.4g} that the {curve.family} family costs",
            hint=f"ask for {most:.4g} or less",
        )


def _up(cost: float) -> float:
    """Four digits, rounded up: a budget that can be asked for."""
    return float(np.ceil(cost * 1e4) / 1e4)


def _top_up(candidate: Candidate, wanted: Floats, budget: Budget) -> Candidate:
    """Give tokens back until none fits: to stages, to layers where most is lacking, at cuts."""
    before = None
    while candidate != before:
        before = candidate
        for layer in before.cut_layers():  # a stage that grows into the one before it stays one
            candidate = _within(budget, raise_stage(candidate, layer), candidate)
        lacking = np.asarray(candidate.keeps) - wanted
        for layer in np.argsort(lacking[1:], kind="stable") + 1:
            candidate = _within(budget, raise_keep(candidate, int(layer)), candidate)
        for layer in candidate.cut_layers():
            candidate = _within(budget, without_cut(candidate, layer), candidate)
    return candidate


def _within(budget: Budget, raised: Candidate | None, candidate: Candidate) -> Candidate:
    """``raised`` if the budget allows it."""
    return candidate if raised is None or budget.cost(raised) > budget.target else raised


def raise_keep(candidate: Candidate, layer: int) -> Candidate | None:
    """One more token enters ``layer``; None where the layer before has no more."""
    keeps = list(candidate.keeps)
    if layer == 0 or keeps[layer] == keeps[layer - 1]:
        return None
    keeps[layer] += 1
    return Candidate(tuple(keeps), candidate.score, candidate.parts)


def raise_stage(candidate: Candidate, layer: int) -> Candidate:
    """One more token in each layer that keeps as many as ``layer``, which begins a stage."""
    return _with_stage(candidate, layer, candidate.keeps[layer] + 1)


def without_cut(candidate: Candidate, layer: int) -> Candidate:
    """The stage that ``layer`` begins keeps what the one before it keeps."""
    return _with_stage(candidate, layer, candidate.keeps[layer - 1])


def _with_stage(candidate: Candidate, layer: int, keep: int) -> Candidate:
    level = candidate.keeps[layer]
    keeps = tuple(keep if old == level else old for old in candidate.keeps)
    return Candidate(keeps, candidate.score, candidate.parts)
