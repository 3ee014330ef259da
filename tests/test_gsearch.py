"""G-Search against exhaustive search, on oracles that keep its assumption and on some that do not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llava

from vtr_export.families import read_facts
from vtr_export.search.candidate import Candidate, Score, Space
from vtr_export.search.gsearch import Found, floors, gsearch, levels_of

FACTS = read_facts(tiny_llava(layers=4).config.to_dict(), "tiny")
SPACE, SCORE, PARTS = Space(FACTS), Score(), 16
LEVELS = (0, 3, 8, 12, PARTS)


@dataclass(frozen=True)
class Measured:
    candidate: Candidate
    metric: float | None


@dataclass
class Judge:
    """Measures by a function of the keeps; abandons what is below the floor."""

    metric: Callable[[Sequence[int]], float]
    asked: list[Candidate] = field(default_factory=list)
    ahead: list[tuple[Candidate, tuple[Candidate, ...]]] = field(default_factory=list)
    settled: list[tuple[Candidate, int]] = field(default_factory=list)

    def judge(
        self, candidate: Candidate, floor: float, ahead: Sequence[Candidate] = ()
    ) -> Measured:
        self.asked.append(candidate)
        self.ahead.append((candidate, tuple(ahead)))
        metric = self.metric(candidate.keeps)
        return Measured(candidate, metric if metric >= floor else None)

    def settle(self, candidate: Candidate, layer: int) -> None:
        self.settled.append((candidate, layer))


def exhaustive(metric: Callable[[Sequence[int]], float], floor: float) -> tuple[int, ...]:
    """The first in lexical order of all never-growing lists that pass."""
    lists = ((PARTS, *keeps) for keeps in product(LEVELS, repeat=SPACE.layers - 1))
    falling = (keeps for keeps in lists if list(keeps) == sorted(keeps, reverse=True))
    return min(keeps for keeps in falling if metric(keeps) >= floor)


def search(judge: Judge, floor: float, checks: int = 1, split: float = 0.25) -> Found:
    return gsearch(
        judge,
        SPACE,
        SCORE,
        floor=lambda layer: floor,
        levels=LEVELS,
        checks=checks,
        split=split,
    )


gains = st.lists(st.integers(0, 5), min_size=len(LEVELS), max_size=len(LEVELS))


@st.composite
def monotone(draw: st.DrawFn) -> tuple[Callable[[Sequence[int]], float], float]:
    """A metric that never rises when a layer sees fewer tokens, and a floor all tokens reach."""
    rises = [draw(gains) for _ in range(SPACE.layers)]
    tables = [
        dict(zip(LEVELS, (sum(row[: i + 1]) for i in range(len(row))), strict=True))
        for row in rises
    ]
    combine = draw(st.sampled_from([sum, min]))
    whole = float(combine([table[PARTS] for table in tables]))

    def metric(keeps: Sequence[int]) -> float:
        return float(combine([table[keep] for table, keep in zip(tables, keeps, strict=True)]))

    return metric, whole - draw(st.integers(0, 12))


@given(monotone(), st.integers(0, 3), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
@settings(max_examples=300)
def test_where_fewer_tokens_never_do_better_it_is_exhaustive_search(
    case: tuple[Callable[[Sequence[int]], float], float], checks: int, split: float
) -> None:
    metric, floor = case
    found = search(Judge(metric), floor, checks, split)
    assert found.candidate.keeps == exhaustive(metric, floor)
    assert found.violations() == ()
    assert found.layer == SPACE.layers - 1


@given(st.data())
@settings(max_examples=100)
def test_whatever_the_metric_the_result_passes_and_never_grows(data: st.DataObject) -> None:
    values: dict[tuple[int, ...], float] = {(PARTS,) * SPACE.layers: 1.0}

    def metric(keeps: Sequence[int]) -> float:
        key = tuple(keeps)
        if key not in values:
            values[key] = data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
        return values[key]

    found = search(Judge(metric), 0.8)
    assert values[found.candidate.keeps] >= 0.8
    assert list(found.candidate.keeps) == sorted(found.candidate.keeps, reverse=True)


def test_a_smaller_keep_that_passes_is_taken_and_reported() -> None:
    judge = Judge(lambda keeps: float(keeps[1] in (0, 12, PARTS)))
    found = search(judge, 1.0, split=0.5)
    assert found.candidate.keeps[1] == 0
    assert [(one.fewer.keep, one.more.keep) for one in found.violations()] == [(0, 3), (0, 8)]
    assert all(one.layer == 1 and one.fewer.passed for one in found.violations())


def test_what_may_come_next_is_named_ahead() -> None:
    judge = Judge(lambda keeps: float(sum(keeps)))
    tries = search(judge, 0.6 * PARTS * SPACE.layers, checks=0).tries
    followed = 0
    for i, one in enumerate(tries[1:]):
        if one.layer == tries[i].layer:
            assert judge.asked[i + 1] in judge.ahead[i][1]
            followed += 1
    assert followed


def test_each_layer_settles_what_is_before_it() -> None:
    judge = Judge(lambda keeps: float(sum(keeps)))
    found = search(judge, 0.5 * PARTS * SPACE.layers)
    assert [layer for _, layer in judge.settled] == [1, 2, 3]
    for candidate, layer in judge.settled:
        assert candidate.keeps[:layer] == found.candidate.keeps[:layer]


def test_layers_before_the_first_keep_everything() -> None:
    judge = Judge(lambda keeps: float(keeps[1] == keeps[2] == PARTS))
    options: dict[str, Any] = {"floor": lambda layer: 1.0, "levels": LEVELS}
    assert gsearch(judge, SPACE, SCORE, first=3, **options).candidate.keeps == (PARTS,) * 3 + (0,)
    assert [layer for _, layer in judge.settled] == [3]


def test_the_tolerance_is_spent_layer_by_layer_or_at_once() -> None:
    even, first = (floors(0.9, 0.3, range(2, 5), spend) for spend in ("even", "first"))
    assert [round(even(layer), 6) for layer in (2, 3, 4)] == [0.8, 0.7, 0.6]
    assert [round(first(layer), 6) for layer in (2, 3, 4)] == [0.6] * 3


def test_levels_hold_none_and_all() -> None:
    assert levels_of(16, 5) == (0, 5, 10, 15, 16)
    assert levels_of(16, 8) == (0, 8, 16)
    assert levels_of(16, 99) == (0, 16)
