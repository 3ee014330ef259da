"""PruMerge's and FocusLLaVA's words and numbers, before any graph."""

from fractions import Fraction
from typing import Any

import pytest
from test_reduction_numbers import FACTS, llava, vision

from vtr_export.errors import ScheduleError
from vtr_export.reductions.focusllava import FocusLLaVA
from vtr_export.reductions.prumerge import PruMerge, PruMergePlus
from vtr_export.schedule import Schedule

N, ROWS, WIDTH = 576, 577, 1024  # of LLaVA-1.5's tower; 23 of its 24 layers feed the projector


def test_as_many_tokens_as_published() -> None:
    tower, eighth = llava(), Fraction(1, 8)
    assert PruMerge(ratio=eighth).count(tower) == 72 + 1
    assert PruMergePlus(ratio=eighth).count(tower) == 72 + 72 + 1
    assert PruMerge().count(tower) == N // 4 + 1  # no more can be outliers
    assert PruMergePlus().count(tower) == N + 1
    forms = [kind.form for kind in (PruMerge(), PruMergePlus(), FocusLLaVA())]
    assert forms == ["data-dependent"] * 3
    assert PruMergePlus(ratio=eighth).form == "static"
    assert vision("[{method: prumerge+, ratio: 12.5%}]").resolve(FACTS).tokens_left == 145


@pytest.mark.parametrize(
    ("ratio", "count"), [("1/1000", 1 + 1), ("100%", N + 1), ("1/3", N // 3 + 1)]
)
def test_one_token_stands_out_at_least(ratio: str, count: int) -> None:
    (reduction,) = vision(f"[{{method: prumerge, ratio: {ratio}}}]").document.vision
    assert reduction.count(llava()) == count


def test_costs_are_those_of_its_products() -> None:
    """Multiply-adds: queries and keys of a layer that nothing else needs, one row, k rows."""
    projected, row = 2 * ROWS * WIDTH**2, ROWS * WIDTH
    merged = 72 * N * WIDTH + 73 * N * WIDTH
    assert PruMerge(ratio=Fraction(1, 8)).flops(llava()) == 2 * (projected + row + merged)
    routed = 36 * (WIDTH * WIDTH // 4 + WIDTH // 4 * 3)
    assert FocusLLaVA().flops(llava()) == 2 * routed + 3 * N * WIDTH


@pytest.mark.parametrize(
    "ratio", ["3", "0.125", "0%", "0", "101%", "x", "true", "-1/8", "1/9999999"]
)
@pytest.mark.parametrize("method", ["prumerge", "prumerge+"])
def test_a_ratio_is_an_exact_share(method: str, ratio: str) -> None:
    with pytest.raises(ScheduleError, match=r"not a share of the tokens[\s\S]*vision\[0\]\.ratio"):
        vision(f"[{{method: {method}, ratio: {ratio}}}]")


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ("{method: prumerge}", "compares the keys of all tokens"),
        ("{method: prumerge+, ratio: 50%}", "compares the keys of all tokens"),
        ("{method: focusllava}", "lie in no grid"),
    ],
)
def test_behind_a_reduction_that_takes_tokens_it_is_refused(second: str, why: str) -> None:
    schedule = vision(f"[{{method: fastervlm, keep: 50%}}, {second}]")
    with pytest.raises(ScheduleError, match=rf"{why}[\s\S]*vision\[1\][\s\S]*list it first"):
        schedule.resolve(FACTS)


def test_a_schedule_says_its_ratio_again() -> None:
    for ratio in (None, "12.5%", "1/3"):
        entry: dict[str, Any] = {"method": "prumerge+"} | ({"ratio": ratio} if ratio else {})
        schedule = Schedule.from_data({"version": 1, "vision": (entry,)})
        assert Schedule.parse(schedule.dump()) == schedule
