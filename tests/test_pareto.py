"""``vtr bench methods``: schedules at equal shares, what is measured of them, how it is shown."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import vtr
from hypothesis import given
from hypothesis import strategies as st

from vtr_export.checkpoint import read_model_facts
from vtr_export.cost import prefill_cost, vision_flops
from vtr_export.errors import InputError
from vtr_export.pareto.measure import count
from vtr_export.pareto.measured import Point, Refusal, Report, front
from vtr_export.pareto.methods import METHODS, SHARES
from vtr_export.pareto.page import markdown, write
from vtr_export.runtime.artifact import Answer, Timings
from vtr_export.schedule import Schedule

DIGITS = Path(__file__).parents[1] / "samples" / "digits"
FACTS = read_model_facts(DIGITS / "model")
TOKENS, LAYERS, TEXT = 144, 8, 10
POOLED = ("pool & list", "pool & list & cache")  # the root of half has no grid but that of half
REACHED = [(name, share) for name, method in METHODS.items() if not method.own for share in SHARES]


@pytest.mark.parametrize(("name", "share"), REACHED)
def test_a_method_leaves_the_share_or_says_why_not(name: str, share: float) -> None:
    """Twelve and a half per cent of eight layers is what the first one sees: cuts alone cannot."""
    method = METHODS[name]
    if method.phase == "prefill" and share == 1 / LAYERS and name != "VTW":
        with pytest.raises(InputError, match="already"):
            method.schedule(share, FACTS)
        return
    if share == 0.5 and name in POOLED:
        with pytest.raises(InputError, match="nothing to do inside"):
            method.schedule(share, FACTS)
        return
    schedule = method.schedule(share, FACTS)
    resolved = schedule.resolve(FACTS)
    keeps = resolved.keep_per_layer(resolved.entering(TOKENS))
    left = sum(keeps) / (LAYERS * TOKENS)
    assert 0.85 * share <= left <= 1.03 * share, keeps
    assert list(keeps) == sorted(keeps, reverse=True)
    assert Schedule.parse(schedule.dump()) == schedule
    assert bool(resolved.vision) == (method.phase in ("vision", "both"))
    assert bool(resolved.cuts) == (method.phase in ("prefill", "both"))


def answer(vision: int, *kept: int) -> Answer:
    times = Timings(0.0, 0.0, 0.0, 0.0, 1)
    left = tuple(np.arange(count) for count in kept)
    return Answer("", (), "stop", left, vision + TEXT, vision, times)


def test_costs_are_of_what_was_left_of_each_image() -> None:
    whole = Schedule.unpruned().resolve(FACTS)
    found = count(whole, FACTS, [answer(TOKENS)])
    everything = vision_flops(FACTS, 1) + prefill_cost(FACTS, whole, TOKENS, TEXT, "exact")
    assert found.flops == everything
    assert found.tokens == (TOKENS,) * LAYERS
    adaptive = Schedule.parse("version: 1\nvision: [{method: prumerge}]").resolve(FACTS)
    two = count(adaptive, FACTS, [answer(10), answer(30)])
    assert two.tokens == (20,) * LAYERS
    one, other = (count(adaptive, FACTS, [answer(tokens)]).flops for tokens in (10, 30))
    assert two.flops == (one + other) / 2
    assert one < other < everything


def point(name: str, accuracy: float, flops: float, first: float, asked: float | None) -> Point:
    return Point(
        method=name,
        phase="vision" if asked else "none",
        asked=asked,
        share=asked or 1.0,
        tokens=(144.0, 72.0),
        accuracy=accuracy,
        lost=(1 - accuracy, 0.9 - accuracy, 1.1 - accuracy),
        flops=flops * 1e6,
        flops_ratio=flops / 100,
        first_ms=10 * first,
        first_ratio=first,
        step_ms=0.5,
        step_ratio=1.0,
        peak_bytes=100 << 20,
        schedule="version: 1\n",
    )


REPORT = Report(
    model="digits",
    command="vtr bench methods model --questions held",
    date="2026-01-01",
    machine="a machine",
    threads=1,
    questions=200,
    metric="exact",
    repeats=3,
    steps=4,
    text_tokens=10.0,
    points=(
        point("unpruned", 1.0, 100, 1.0, None),
        point("good", 0.9, 50, 0.7, 0.5),
        point("slow", 0.8, 40, 0.9, 0.25),
        point("poor", 0.7, 60, 0.8, 0.5),
    ),
    refusals=(Refusal("odd", 0.5, "it cannot"), Refusal("odd", 0.25, "it cannot")),
)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_beats(pairs: list[tuple[int, int]]) -> None:
    points = [point(str(i), a / 5, f, 1.0, 0.5) for i, (a, f) in enumerate(pairs)]
    best = {(one.flops, one.accuracy) for one in front(points, "flops")}
    unbeaten = {
        (p.flops, p.accuracy)
        for p in points
        if not any(
            q.flops <= p.flops
            and q.accuracy >= p.accuracy
            and (q.flops, q.accuracy) != (p.flops, p.accuracy)
            for q in points
        )
    }
    assert best == unbeaten


def test_the_page_marks_the_fronts_and_lists_refusals(tmp_path: Path) -> None:
    write(REPORT, tmp_path)
    assert Report.from_json(json.loads((tmp_path / "methods.json").read_text())) == REPORT
    page = (tmp_path / "methods.md").read_text()
    assert page == markdown(REPORT)
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    named = [row[2].strip() for row in rows[2:]]
    assert named == ["***unpruned***", "***good***", "poor", "**slow**"]
    assert "odd: 50 %, 25 %: it cannot" in page
    svg = (tmp_path / "methods.svg").read_text()
    ElementTree.fromstring(svg)
    write(REPORT, tmp_path)
    assert (tmp_path / "methods.svg").read_text() == svg
    with pytest.raises(InputError, match="cannot write"):
        write(replace(REPORT), tmp_path / "nowhere")


def test_the_command_measures_and_refuses(tmp_path: Path) -> None:
    """A method and one that needs trained weights, a few questions of the sample."""
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "images").symlink_to(DIGITS / "images")
    lines = (DIGITS / "questions.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    (tmp_path / "held" / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sizes = ("--share", "0.25", "--repeats", "1", "--steps", "2", "--max-new-tokens", "4")
    methods = ("FastV", "FocusLLaVA sampler")
    given = [word for name in methods for word in ("--method", name)]
    model, held = DIGITS / "model", tmp_path / "held"
    words = (model, "--questions", held, "--out", tmp_path, *sizes, *given, "--json")
    done = vtr("bench", "methods", *words)
    assert done.code == 0, done.err
    report = Report.from_json(done.json)
    assert [one.method for one in report.points] == ["unpruned", "FastV"]
    whole, one = report.points
    assert whole.accuracy == 1.0
    assert whole.share == whole.flops_ratio == 1.0
    assert 0.24 < one.share <= 0.25
    assert one.flops_ratio < 0.7
    assert one.first_ms > 0 < one.step_ms
    assert one.peak_bytes > 10 << 20
    assert [one.method for one in report.refusals] == ["FocusLLaVA sampler"]
    assert "--questions held" in report.command
    assert str(tmp_path) not in (tmp_path / "methods.md").read_text()


def test_a_folder_of_that_name_is_still_an_artifact(tmp_path: Path) -> None:
    folder = tmp_path / "methods"
    folder.mkdir()
    assert "manifest" in vtr("bench", folder).err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "nothing"), "no method 'nothing'"),
        (("--metric", "kl"), "looks at no answer"),
        (("--out", "nowhere"), "no such folder"),
    ],
)
def test_what_cannot_be_compared_is_refused(words: tuple[str, str], said: str) -> None:
    done = vtr("bench", "methods", DIGITS / "model", "-q", DIGITS / "questions.jsonl", *words)
    assert done.code == 2
    assert said in done.err
