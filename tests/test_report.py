"""The search report: whole HTML that needs nothing else and shows what it was given, escaped."""

import math
import resource
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import save_checkpoint, tiny_llava

from vtr_export.errors import InputError, UnavailableError
from vtr_export.runtime.show_kept import DARK, Grid
from vtr_export.search.budget import Budget
from vtr_export.search.candidate import Candidate, Score
from vtr_export.search.comparison import Row
from vtr_export.search.curves import Sigmoid, Solved
from vtr_export.search.gsearch import Try, Violation
from vtr_export.search.psigmoid import Ranges, Trial, Tuned
from vtr_export.search.questions.statistics import Difference
from vtr_export.search.ranks import ranks
from vtr_export.search.report.examples import examples
from vtr_export.search.report.page import (
    Compared,
    Curve,
    Effort,
    KeptImage,
    Point,
    Result,
    ScoreTrial,
    SearchReport,
    page,
    write,
)
from vtr_export.search.report.plots import pareto_front
from vtr_export.search.trial_store import Result as TrialResult

HOSTILE = '$\\frac{$ </td></pre><script src="http://e.vil/x.js">alert(1)</script>'
VOID = {"meta", "img", "br", "hr", "input", "link"}
RNG = np.random.default_rng(0)
WORSE = Difference(-0.0156, -0.0461, 0.0153, 128, 64, 0, 2, 0.5)
PICTURE = Image.new("RGB", (28, 28), (200, 100, 50))


def tuned() -> Tuned:
    """Two trials; the second is better."""
    budget = Budget(HOSTILE, 0.4, lambda candidate: candidate.mean_keep)
    solved = Solved(Sigmoid(0.05, 1.5), 1.25, Candidate((16, 2, 1), Score(), 16), 0.39)
    trials = (
        Trial(0, "given", solved, TrialResult(0.9, 0.02, 128)),
        Trial(1, "sampled", replace(solved, value=2.75), TrialResult(0.95, None, 128)),
    )
    return Tuned(trials, Ranges((0.0, 1.0), (0.1, 10.0)), budget)


SECTIONS: dict[str, dict[str, Any]] = {
    "result": {"result": Result(0.98437, 1.0, 2128, WORSE, 0.172, 0.2337, HOSTILE)},
    "keeps": {"curves": (Curve("ours", (16, 4, 4), "result"), Curve(HOSTILE, (16, 8, 2)))},
    "examples": {
        "kept": (
            KeptImage(
                PICTURE, Grid(4, 4, 7), {1: (0, 5), 2: ()}, HOSTILE, HOSTILE + "a", HOSTILE + "b"
            ),
        )
    },
    "pareto": {
        "points": (
            Point("", 0.5, 0.9),
            Point("ours", 0.4, 0.95, "result", (0.93, 0.97)),
            Point(HOSTILE, 0.4, 0.9, "comparison"),
        )
    },
    "compared": {
        "compared": (Compared(HOSTILE, 0.97, HOSTILE, WORSE, 0.4, 0.3), Compared("none", None)),
        "budget": HOSTILE,
        "compared_as": HOSTILE,
    },
    "tries": {
        "tries": (Try(1, 8, True, 0.99), Try(1, 4, False, 0.5), Try(2, 2, False, None)),
        "floor": 0.98,
        "violations": (Violation(2, Try(2, 2, True, 0.992), Try(2, 4, False, None)),),
    },
    "scores": {"scores": (ScoreTrial(HOSTILE, 0.98, 0.0183, True), ScoreTrial("other", 0.5))},
    "tuned": {"tuned": tuned()},
    "ranks": {"ranks": ranks([RNG.random((3, 16)) for _ in range(2)], Score())},
    "schedule": {"schedule": f"version: 1\n# {HOSTILE}\n"},
    "provenance": {"provenance": {HOSTILE: HOSTILE}},
}


class Outline(HTMLParser):
    """Elements of a page; every one that opens must close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " " if tag in {"b", "td", "th", "dt"} else ""

    def handle_data(self, data: str) -> None:
        self.text += "" if self.open and self.open[-1] == "style" else data

    def all(self, attribute: str) -> list[str]:
        return [str(attrs[attribute]) for _, attrs in self.tags if attribute in attrs]

    def sections(self) -> list[str]:
        return [str(attrs["id"]) for tag, attrs in self.tags if tag == "section"]


def report_of(*names: str, **fields: Any) -> SearchReport:
    data = {key: value for name in names for key, value in SECTIONS[name].items()}
    return SearchReport(**({"title": HOSTILE, "metric": "exact", "parts": 16} | data | fields))


@pytest.fixture(scope="module")
def full() -> str:
    effort = Effort(57, 781_000_000_000, 3_124_000_000_000, 3, 37.2, resumed=True)
    return page(report_of(*SECTIONS, effort=effort, notes=(HOSTILE,)))


def test_the_page_needs_nothing_else(full: str) -> None:
    outline = Outline(full)
    assert {"script", "link", "iframe", "object", "base"}.isdisjoint(t for t, _ in outline.tags)
    ids = outline.all("id")
    assert len(ids) == len(set(ids))
    elsewhere = set(outline.all("href") + outline.all("src")) - {f"#{name}" for name in ids}
    assert all(source.startswith("data:image/") for source in elsewhere)
    assert outline.all("xmlns") + outline.all("xlink:href") == []
    assert "url(" not in full.replace("url(#", "")
    assert "@import" not in full
    assert not [name for _, attrs in outline.tags for name in attrs if name.startswith("on")]


def test_text_from_elsewhere_stays_text(full: str) -> None:
    outline = Outline(full)
    assert "<script" not in full
    assert outline.text.count(HOSTILE) >= 15
    assert f'"{HOSTILE}"' not in full


def test_every_section_is_there_in_a_full_report(full: str) -> None:
    assert sorted(Outline(full).sections()) == sorted(SECTIONS)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_appears_with_its_data_alone(name: str) -> None:
    outline = Outline(page(report_of(name)))
    assert outline.sections() == [name]
    expected = [] if name == "result" else [f"#{name}"]
    assert [str(a["href"]) for tag, a in outline.tags if tag == "a"] == expected


def test_numbers_carry_their_units(full: str) -> None:
    text = " ".join(Outline(full).text.split())
    for said in (
        "98.44 % exact on 2,128 questions",
        "\N{MINUS SIGN}1.56 points",
        "95 % interval \N{MINUS SIGN}4.61 to +1.53 points",
        "17.2 % of the vision tokens, mean over the decoder layers",
        "23.4 % of the unpruned decoder's prefill FLOPs",
        "57 candidates evaluated, 3 of them answered by the ledger, in 37.2 s; resumed",
        "781 GFLOPs spent in the decoder: 25.0 % of naive evaluation, 3.12 TFLOPs",
        "0.0183 nats",
        "exact must be at least 98.00 %",
        "8 99.00 %4 50.00 % failed",
        "2 abandoned",
        "1 sampled, chosen 0.05 1.5 2.75 95.00 % 39.0 % 39.6 %",
    ):
        assert said in text, said


def test_a_comparison_says_what_was_not_measured() -> None:
    candidate = Candidate((16, 8, 0), Score(), 16)
    rows = (
        Row("FastV", "K = 1: the published cannot cost so little", candidate, 0.4, 0.9, 0.1),
        Row("PyramidDrop", "not measured: it cannot cost so little"),
    )
    compared = tuple(Compared.of(row) for row in rows)
    text = " ".join(Outline(page(report_of(compared=compared))).text.split())
    assert "FastV (K = 1: the published cannot cost so little) 90.00 % 40.0 % 50.0 %" in text
    assert text.endswith("PyramidDrop (not measured: it cannot cost so little)")


def test_a_divergence_is_told_in_nats() -> None:
    by_kl = report_of(metric="kl", result=Result(-0.01234, 0.0, 10))
    text = " ".join(Outline(page(by_kl)).text.split())
    assert "\N{MINUS SIGN}0.0123 nats \N{MINUS SIGN}KL on 10 questions" in text
    assert "unpruned 0.0000 nats" in text


def test_kept_patches_are_bright_and_dropped_ones_dark(full: str) -> None:
    from base64 import b64decode
    from io import BytesIO

    sources = [s for s in Outline(full).all("src") if s.startswith("data:image/jpeg;base64,")]
    whole, first, last = (np.array(Image.open(BytesIO(b64decode(s[23:])))) for s in sources)
    cell = len(whole) // 4
    middles = np.arange(4) * cell + cell // 2
    light = first[np.ix_(middles, middles)].mean(2) / whole[np.ix_(middles, middles)].mean(2)
    expected = np.full((4, 4), DARK)
    expected[0, 0] = expected[1, 1] = 1.0  # tokens 0 and 5 of four columns
    np.testing.assert_allclose(light, expected, atol=0.03)
    assert (last[np.ix_(middles, middles)] < 0.3 * 255).all()


def test_the_same_report_is_the_same_page() -> None:
    report = report_of("keeps", "pareto")
    assert page(report) == page(report)


points = st.builds(
    Point,
    st.just(""),
    st.integers(1, 6).map(float),
    st.integers(0, 6).map(float),
    st.just("measured"),
)


@given(measured=st.lists(points, max_size=12))
def test_the_front_is_what_nothing_beats(measured: list[Point]) -> None:
    def beaten(one: Point) -> bool:
        return any(
            other.flops <= one.flops
            and other.metric >= one.metric
            and (other.flops, other.metric) != (one.flops, one.metric)
            for other in measured
        )

    expected = {(one.flops, one.metric) for one in measured if not beaten(one)}
    front = [(one.flops, one.metric) for one in pareto_front(measured)]
    assert front == sorted(expected)


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file may grow beyond a KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_report_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    (tmp_path / "open elsewhere").hardlink_to(target)
    report = report_of("schedule")
    write(report, target)
    assert target.read_text(encoding="utf-8") == page(report)
    assert (tmp_path / "open elsewhere").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("little_room")
def test_a_full_disk_leaves_the_old_report(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    with pytest.raises(InputError, match="cannot be written"):
        write(report_of("schedule"), target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="report cannot be written"):
        write(report_of("schedule"), tmp_path / "missing" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="report cannot be written"):
        write(report_of("schedule"), tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_pictures_without_matplotlib_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert Outline(page(report_of("schedule"))).sections() == ["schedule"]
    with pytest.raises(UnavailableError) as caught:
        page(report_of("keeps"))
    assert "vtr-export[search]" in caught.value.hint


def test_what_passes_may_differ_by_layer() -> None:
    falling = report_of("tries", floor=lambda layer: 1 - layer / 100)
    text = " ".join(Outline(page(falling)).text.split())
    assert "at least 99.00 % at the first layer, falling to 98.00 % at the last" in text
    assert "1 99.00 % 8 99.00 %4 50.00 % failed" in text
    assert "2 98.00 % 2 abandoned" in text


def test_keeps_may_be_shares() -> None:
    text = Outline(page(replace(report_of("keeps"), parts=100, varies=True))).text
    assert "How many % of the vision tokens enter" in text


# --- the example images of a real run ---


@torch.no_grad()
def test_examples_show_the_tokens_that_the_scores_chose(tmp_path: Path) -> None:
    from vtr_export.reference import positions_of
    from vtr_export.schedule import Cut, Keep, Resolved
    from vtr_export.search.evaluators.torch_model import TorchModel
    from vtr_export.search.questions.calibration import CalibrationSet

    folder = save_checkpoint(tiny_llava(layers=3), tmp_path / "model")
    pixels = RNG.integers(0, 255, (3, 28, 28, 3), np.uint8)
    for number, each in enumerate(pixels[:2]):
        Image.fromarray(each).save(tmp_path / f"{number}.png")
    lines = [
        f'{{"image": "{image}.png", "question": "{asked}", "answers": ["a"]}}'
        for image, asked in ((0, "what is left ?"), (0, "which digit ?"), (1, "how many ?"))
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    questions = CalibrationSet.load(tmp_path / "questions.jsonl").questions
    model, score = TorchModel(folder, "cpu", "fp32"), Score("previous", "last", "mean")
    shown = examples(model, Candidate((16, 7, 3), score, 16), questions, max_new_tokens=3)
    first = {question.images: question for question in reversed(questions)}
    asked = [question for question in questions if question in first.values()]
    assert len(asked) == 2
    for each, question in zip(shown, asked, strict=True):
        assert each.question == question.text
        assert each.view.size == (28, 28)
        assert (each.grid.rows, each.grid.columns, each.grid.leading) == (4, 4, 0)
        batch = model.batch([question])
        cuts = (Cut(1, Keep(7, 16)), Cut(2, Keep(3, 16)))
        runs = model.reference(Resolved(3, 16, cuts))
        step = runs(batch.embeds, batch.mask, positions_of(batch.mask), batch.vision)
        first = best(range(16), step.scores[0][0].tolist(), 7)
        assert each.stages == {1: first, 2: best(first, step.scores[1][0].tolist(), 3)}


def best(tokens: Any, scores: list[float], keep: int) -> tuple[int, ...]:
    ranked = sorted(zip(scores, tokens, strict=True), key=lambda pair: (-pair[0], pair[1]))
    assert not math.isnan(scores[0])
    return tuple(sorted(token for _, token in ranked[:keep]))
