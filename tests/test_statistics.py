"""Intervals cover what they claim, tests agree with counting, and chance is noticed."""

import sys
from math import comb
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtr_export.errors import UnavailableError
from vtr_export.search.questions.calibration import Question
from vtr_export.search.questions.metrics import get_metric
from vtr_export.search.questions.statistics import at_chance, image_groups, paired_difference

stats = pytest.importorskip("scipy.stats", reason="intervals are computed by scipy")


def draw(
    rng: np.random.Generator, shape: tuple[int, int], better: float, worse: float, shared: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right or wrong twice, ``shape`` is groups x questions; some groups change as one."""
    chances = [better, worse, 1 - better - worse]
    change = rng.choice([1, -1, 0], p=chances, size=shape)
    change = np.where(rng.random(shape[0])[:, None] < shared, change[:, :1], change)
    second = np.where(change == 0, rng.random(shape) < 0.8, change < 0).astype(float)
    groups = np.repeat(np.arange(shape[0]), shape[1])
    return (second + change).ravel(), second.ravel(), groups


@pytest.mark.parametrize(
    ("shape", "better", "worse", "shared"),
    [
        ((2000, 1), 0.010, 0.012, 0),
        ((2000, 1), 0.001, 0.002, 0),
        ((342, 6), 0.010, 0.020, 0.5),
        ((342, 6), 0.010, 0.020, 1),
        ((60, 4), 0.05, 0.15, 0.5),
    ],
)
def test_the_interval_covers_the_truth_as_often_as_it_says(
    shape: tuple[int, int], better: float, worse: float, shared: float
) -> None:
    rng = np.random.default_rng(0)
    found = [paired_difference(*draw(rng, shape, better, worse, shared)) for _ in range(400)]
    covered = np.mean([one.low <= better - worse <= one.high for one in found])
    assert 0.92 <= covered <= 0.999  # 0.95 would leave this side one time in 300


def test_the_interval_is_about_that_of_a_bootstrap_over_images() -> None:
    first, second, groups = draw(np.random.default_rng(1), (500, 5), 0.06, 0.11, 0.6)
    found = paired_difference(first, second, groups)
    change = (first - second).reshape(500, 5).mean(1)
    other = stats.bootstrap((change,), np.mean, n_resamples=2000, rng=np.random.default_rng(2))
    low, high = other.confidence_interval
    assert found.mean == pytest.approx(change.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_asking_about_an_image_again_adds_no_certainty() -> None:
    first, second, groups = draw(np.random.default_rng(3), (400, 1), 0.05, 0.10, 0)
    once = paired_difference(first, second, groups)
    often = paired_difference(*(values.repeat(5) for values in (first, second, groups)))
    apart = paired_difference(first.repeat(5), second.repeat(5), np.arange(2000))
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.05)
    assert apart.high - apart.low < 0.5 * (once.high - once.low)
    assert (often.questions, often.groups) == (2000, 400)
    assert often.p_value == once.p_value


@pytest.mark.parametrize("questions", [1, 2, 20, 2000])
def test_questions_that_all_agree_are_no_certainty(questions: int) -> None:
    same = np.ones(questions)
    found = paired_difference(same, same, np.arange(questions))
    assert found.mean == 0
    assert found.p_value == 1
    assert found.high == -found.low
    missed = 1 - found.high  # had the loss been as large, would none of the questions show it?
    assert missed**questions < 0.1
    assert found.high <= 4 / questions


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 9)), min_size=1, max_size=60)
)
def test_exchanging_the_two_mirrors_everything(rows: list[tuple[bool, bool, int]]) -> None:
    first, second = (np.array([row[i] for row in rows], float) for i in (0, 1))
    groups = np.array([row[2] for row in rows])
    one, other = paired_difference(first, second, groups), paired_difference(second, first, groups)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))
    assert (one.better, one.worse) == (other.worse, other.better)
    assert one.p_value == pytest.approx(other.p_value)
    assert -1 <= one.low <= one.mean <= one.high <= 1
    order = np.random.default_rng(len(rows)).permutation(len(rows))
    again = paired_difference(first[order], second[order], 100 - 7 * groups[order])
    assert (again.low, again.high) == pytest.approx((one.low, one.high))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 20))
def test_the_p_value_is_mcnemar_s_by_counting(better: int, worse: int, same: int) -> None:
    changes = [1] * better + [-1] * worse + [0] * (same + 1)
    second = np.array([change < 0 for change in changes], float)
    found = paired_difference(second + changes, second, np.arange(len(changes)))
    total, fewer = better + worse, min(better, worse)
    tail = sum(comb(total, count) for count in range(fewer + 1)) / 2**total
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))
    assert (found.better, found.worse) == (better, worse)


def test_scores_without_bounds_get_student_s_interval() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.normal(-3, 2, (2, 50))
    found = paired_difference(first, second, np.arange(50), reach=None)
    student = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(student))
    assert found.p_value is None


def test_one_image_says_nothing_about_others() -> None:
    scores, groups = np.array([1.0, 0, 1, 1]), np.zeros(4, np.int64)
    bounded = paired_difference(scores, 1 - scores, groups)
    assert (bounded.low, bounded.high) == (-1, 1)
    unbounded = paired_difference(scores, 1 - scores, groups, reach=None)
    assert np.isinf([unbounded.low, unbounded.high]).all()


@pytest.mark.parametrize(
    ("first", "second", "groups"),
    [
        (np.ones(3), np.ones(2), np.arange(3)),
        (np.ones(3), np.ones(3), np.arange(2)),
        (np.ones(0), np.ones(0), np.arange(0)),
        (np.array([1.0, np.nan]), np.ones(2), np.arange(2)),
        (np.array([1.0, -np.inf]), np.ones(2), np.arange(2)),
    ],
)
def test_scores_that_cannot_be_compared_are_our_mistake(
    first: np.ndarray, second: np.ndarray, groups: np.ndarray
) -> None:
    with pytest.raises(ValueError, match=r"shape|finite"):
        paired_difference(first, second, groups)


def about(images: tuple[str, ...], answers: tuple[str, ...] = ()) -> Question:
    return Question(tuple(map(Path, images)), "?", answers, "q.jsonl:1", "", images)


@given(st.lists(st.sets(st.sampled_from("abcdefghij"), min_size=1, max_size=3), min_size=1))
def test_questions_are_grouped_by_the_images_they_share(shown: list[set[str]]) -> None:
    groups = image_groups([about(tuple(images)) for images in shown])
    merged: list[set[str]] = []
    for images in shown:
        touching = [one for one in merged if one & images]
        merged = [one for one in merged if not one & images] + [images.union(*touching)]
    wanted = [next(i for i, one in enumerate(merged) if images <= one) for images in shown]
    pairs = set(zip(groups.tolist(), wanted, strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(merged)


def yes_or_no(yes: int, no: int) -> list[Question]:
    answers = ["yes"] * yes + ["no"] * no
    return [about((str(i),), (answer,)) for i, answer in enumerate(answers)]


def test_always_saying_the_same_is_chance() -> None:
    questions, exact = yes_or_no(120, 80), get_metric("exact")
    always_yes = np.array([1.0] * 120 + [0.0] * 80)
    warning = at_chance(always_yes, questions, exact)
    assert warning is not None
    assert "'yes'" in warning
    assert "60.0%" in warning
    assert at_chance(1 - always_yes, questions, exact)
    assert at_chance(np.ones(200), questions, exact) is None


def test_the_best_constant_answer_need_not_be_the_commonest() -> None:
    answers = ["red"] * 30 + ["blue"] * 20 + ["red or blue"] * 5
    questions = [about((str(i),), (answer,)) for i, answer in enumerate(answers)]
    scores = np.array([1.0] * 45 + [0.0] * 10)
    assert at_chance(scores, questions, get_metric("exact")) is None
    warning = at_chance(scores, questions, get_metric("contains"))
    assert warning is not None
    assert "'red or blue'" in warning


def test_a_lead_that_could_be_luck_is_chance_too() -> None:
    questions, exact = yes_or_no(100, 100), get_metric("exact")
    lucky = np.tile([1.0, 0.0], 100)
    lucky[1] = 1
    assert at_chance(lucky, questions, exact)


def test_agreement_is_never_at_chance() -> None:
    assert at_chance(np.ones(4), yes_or_no(2, 2), get_metric("agreement")) is None


def test_missing_scipy_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UnavailableError) as caught:
        paired_difference(np.ones(3), np.ones(3), np.arange(3))
    assert "vtr-export[search]" in caught.value.hint
