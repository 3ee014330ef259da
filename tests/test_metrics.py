"""Metrics, by cases worked out by hand and by the definition written out in another way."""

import subprocess
import sys
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtr_export.errors import InputError
from vtr_export.search.questions.calibration import Question
from vtr_export.search.questions.metrics import METRICS, get_metric, vqa_words


def asked(*answers: str) -> Question:
    return Question((), "?", answers, "questions.jsonl:1", "")


def score(name: str, given: str, *answers: str) -> float:
    metric = get_metric(name)
    assert metric.text is not None
    return metric.text(given, asked(*answers))


@pytest.mark.parametrize(
    ("given", "answer", "right"),
    [
        ("7", "7", True),
        (" Top\n left ", "top left", True),
        ("Yes.", "yes", True),
        ("STRASSE", "straße", True),
        ("cafe\u0301", "caf\u00e9", True),
        ("...", "...", True),
        ("yes!", "yes", False),
        ("x\u00b2", "x2", False),
        ("7.0", "7", False),
        ("7 dogs", "7", False),
        ("", "7", False),
        (".", "7", False),
    ],
)
def test_exact_minds_neither_case_nor_space_nor_a_final_stop(
    given: str, answer: str, right: bool
) -> None:
    assert score("exact", given, answer) == right
    assert score("exact", answer, given) == right
    assert score("exact", given, "another", answer, "a third") == right


@pytest.mark.parametrize(
    ("given", "answer", "right"),
    [
        ("It is 7.", "7", True),
        ("The answer: Red, I think", "red", True),
        ("top-left corner", "left", True),
        ("at the  top\nleft", "top left", True),
        ("costs $7", "7", True),
        ("written in C++ mostly", "c++", True),
        ("他在北京工作", "北京", True),
        ("17", "7", False),
        ("7.5", "7", False),
        ("1.7", "7", False),
        ("1,700", "700", False),
        ("it is -7", "7", False),
        ("the range 3-7", "7", True),
        ("bored", "red", False),
        ("redder", "red", False),
        ("", "red", False),
        (".*", "red", False),
        ("red", ".*", False),
    ],
)
def test_contains_looks_for_whole_words(given: str, answer: str, right: bool) -> None:
    assert score("contains", given, answer) == right
    assert score("contains", given, "zebra", answer) == right


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The Dog", "dog"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("top-left", "top left"),
        ("top - left", "top left"),
        ("yes!", "yes"),
        ("dont", "don't"),
        ("1,000", "1000"),
        ("(red)", "red"),
        ("U.S.", "us"),
        ("A.", "a"),
        ("red\n", "red"),
    ],
)
def test_vqa_words_that_are_the_same(one: str, other: str) -> None:
    assert vqa_words(one) == vqa_words(other)


@pytest.mark.parametrize(
    ("one", "other"), [("2.5", "25"), ("A", "the"), ("A", ""), ("?", "!"), ("$5", "5"), ("B", "")]
)
def test_vqa_words_that_differ(one: str, other: str) -> None:
    assert vqa_words(one) != vqa_words(other)


@given(
    people=st.lists(st.sampled_from(["red", "the Red", "blue", "green"]), min_size=1, max_size=13),
    given_=st.sampled_from(["red", "blue.", "a green", "none of them"]),
)
def test_vqa_accuracy_is_the_mean_over_who_is_left_out(people: list[str], given_: str) -> None:
    bare = {"the Red": "red", "blue.": "blue", "a green": "green"}
    said = [bare.get(one, one) for one in people]
    wanted = bare.get(given_, given_)
    if len(people) >= 10:
        panels, needed = list(combinations(said, len(said) - 1)), 3
    else:
        panels, needed = [tuple(said)], min(3, len(said))
    shares = [min(1, panel.count(wanted) / needed) for panel in panels]
    assert score("vqa", given_, *people) == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize(("matches", "wanted"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_vqa_accuracy_of_ten_people_is_the_published_scale(matches: int, wanted: float) -> None:
    answers = ["red"] * matches + ["blue"] * (10 - matches)
    assert score("vqa", "Red", *answers) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("given", "answer", "right"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("1.05", "1", True),
        ("0.105", "0.1", True),
        ("105.01", "100", False),
        ("94.99", "100", False),
        ("-100", "100", False),
        ("\u2212102", "-100", True),
        ("1,020", "1000", True),
        ("10,20", "1020", False),
        ("51%", "0.5", True),
        ("51%", "50%", True),
        ("50%", "50", False),
        ("0.0", "0", True),
        ("0.001", "0", False),
        ("1e3", "1000", True),
        ("1e9", "1000", False),
        ("1e999999999", "1000", False),
        ("nan", "nan", True),
        ("nan", "1", False),
        ("inf", "1", False),
        ("Red.", "red", True),
        ("reds", "red", False),
        ("", "0", False),
        (".", "0", False),
        ("%", "0", False),
        ("about 100", "100", False),
    ],
)
def test_relaxed_takes_numbers_within_five_percent(given: str, answer: str, right: bool) -> None:
    assert score("relaxed", given, answer) == right
    assert score("relaxed", given, "zebra", answer) == right


@given(st.integers(1, 10**6), st.integers(0, 2 * 10**6), st.integers(0, 4))
def test_relaxed_is_exact_at_the_edge(answer: int, given_: int, places: int) -> None:
    shown = [f"{value / 10**places:.{places}f}" for value in (given_, answer)]
    within = 20 * abs(given_ - answer) <= answer
    assert score("relaxed", *shown) == within


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=11))
def test_any_text_gets_a_score_in_range(given_: str, answers: list[str]) -> None:
    for metric in METRICS.values():
        if metric.text is not None:
            assert metric.worst <= metric.text(given_, asked(*answers)) <= metric.best


@given(st.text(min_size=1, max_size=30).filter(str.strip))
def test_the_answer_itself_is_right(text: str) -> None:
    for metric in METRICS.values():
        if metric.text is not None:
            assert metric.text(text, asked(*[text] * 10)) == pytest.approx(metric.best)


def test_labels_are_needed_where_texts_are_compared() -> None:
    assert {name for name, metric in METRICS.items() if metric.needs_answers} == {
        name for name, metric in METRICS.items() if metric.text is not None
    }
    assert {"agreement", "kl"} <= set(METRICS)
    unbounded = {name for name, metric in METRICS.items() if metric.reach is None}
    assert unbounded == {"kl"}


def test_scores_do_not_depend_on_the_process() -> None:
    text = 'it\'s (top-left), 1,000/2 = \\_500_; "or" [so]'
    code = f"from vtr_export.search.questions.metrics import vqa_words; print(vqa_words({text!r}))"
    seen = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        )
        seen.add(done.stdout.strip())
    assert seen == {vqa_words(text)}


def test_an_unknown_metric_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        get_metric("exakt")
    assert "'exact'" in caught.value.hint
    assert "relaxed" in caught.value.hint
