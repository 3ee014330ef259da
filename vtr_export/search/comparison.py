"""What others do at the same budget: FastV, PyramidDrop, and curves without a search."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vtr_export.search.budget import Budget
from vtr_export.search.candidate import Candidate, Score, Space
from vtr_export.search.curves import (
    Curve,
    Exponential,
    FastV,
    Linear,
    Pyramid,
    Random,
    Solved,
    reach,
    solve,
)
from vtr_export.search.psigmoid import Measured, Measures

FASTV: Final = Score("previous", "last", "mean")  # its score as published, and K = 2
PYRAMID: Final = Score("next", "last", "mean")  # the layer about to run; four parts
FASTV_K: Final = 2
PYRAMID_PARTS: Final = 4
RANDOM: Final = 3  # curves drawn


@dataclass(frozen=True)
class Row:
    """One schedule of the table; ``note`` says what is not as published, or why it is missing."""

    name: str
    note: str
    candidate: Candidate | None = None
    cost: float | None = None  # fraction of the unpruned model
    metric: float | None = None
    kl: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        one = self.candidate
        return {
            "name": self.name,
            "note": self.note,
            "keeps": None if one is None else list(one.keeps),
            "parts": None if one is None else one.parts,
            "score": None if one is None else one.score.to_data(),
            "cost": self.cost,
            "metric": self.metric,
            "kl": self.kl,
        }


@dataclass(frozen=True)
class _Entry:
    """A family in the table: the first of ``curves`` that reaches the budget stands for it."""

    name: str
    curves: tuple[Curve, ...]
    score: Score


def compare(
    runner: Measures,
    space: Space,
    budget: Budget,
    score: Score,
    *,
    seed: int = 0,
    found: Mapping[str, Candidate] | None = None,
) -> tuple[Row, ...]:
    """Measure ``found`` (by name) beside the published methods and plain curves at one budget.

    FastV and PyramidDrop rank as published, and once more by ``score``; the others by ``score``. A
    method that cannot cost so little takes its next parameter that can, and says so.
    """
    named = {name: Row(name, "", one, budget.cost(one)) for name, one in (found or {}).items()}
    rows = [*named.values()]
    rows += [_row(entry, space, budget) for entry in _entries(space, score, seed)]
    asked = list(dict.fromkeys(row.candidate for row in rows if row.candidate is not None))
    measured = {one.candidate: one for one in runner.measure(asked)}
    return tuple(_filled(row, measured) for row in rows)


def _entries(space: Space, score: Score, seed: int) -> Iterator[_Entry]:
    steps = tuple(FastV(k) for k in range(min(FASTV_K, space.layers - 1), 0, -1))
    parts = tuple(Pyramid(n) for n in range(min(PYRAMID_PARTS, space.layers), space.layers + 1))
    for name, curves, published in (("FastV", steps, FASTV), ("PyramidDrop", parts, PYRAMID)):
        yield _Entry(name, curves, published)
        if score != published:
            yield _Entry(f"{name}, our score", curves, score)
    yield _Entry("linear", (Linear(),), score)
    yield _Entry("exponential", (Exponential(),), score)
    for number in range(seed, seed + RANDOM):
        yield _Entry(f"random {number}", (Random(number),), score)


def _row(entry: _Entry, space: Space, budget: Budget) -> Row:
    """The entry at the budget, not yet measured."""
    if entry.score not in space.scores:
        return Row(entry.name, f"not measured: what is searched does not rank {entry.score}")
    for curve in entry.curves:
        if reach(curve, space, entry.score, budget)[0] <= budget.target:
            solved = solve(curve, space, entry.score, budget)
            return Row(entry.name, _note(entry, solved), solved.candidate, solved.cost)
    return Row(entry.name, "not measured: it cannot cost so little")


def _note(entry: _Entry, solved: Solved) -> str:
    """Which parameter stands for the method, and whether it is the published one."""
    match solved.curve:
        case FastV(k):
            said = f"K = {k}"
        case Pyramid(parts):
            said = f"{parts} parts"
        case _:
            return ""
    return (
        said if solved.curve == entry.curves[0] else f"{said}: the published cannot cost so little"
    )


def _filled(row: Row, measured: Mapping[Candidate, Measured]) -> Row:
    if row.candidate is None:
        return row
    one = measured[row.candidate]
    return Row(row.name, row.note, row.candidate, row.cost, one.metric, one.kl)
