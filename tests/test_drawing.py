"""Keep-per-layer curves, as text and as pictures."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vtr_export.drawing import WIDTH, Curve, picture, text
from vtr_export.errors import InputError, UnavailableError
from vtr_export.schedule import Schedule
from vtr_export.steps import steps_of

CELL = re.compile(r"(\d+%?)((?: #+)?)")


def curve(name: str, schedule: Schedule, **known: int) -> Curve:
    return Curve(name, steps_of(schedule, **known))


FASTV = curve("fastv", Schedule.fastv(), layers=32, tokens=576)
FITPRUNE = curve("fitprune", Schedule.fitprune("60%"))
SHARES = curve("pyramid", Schedule.pyramid())


def bars(line: str) -> list[int]:
    """Lengths of the bars of a line."""
    return [len(bar) for bar in re.findall("#+", line)]


def test_a_line_for_each_run_with_its_tokens_and_a_bar_as_long() -> None:
    whole, half = text([FASTV], "#")
    assert whole.split()[:3] == ["layers", "0-1", "576"]
    assert half.split()[:2] == ["2-31", "288"]
    assert bars(whole)[0] == 2 * bars(half)[0]
    assert len(whole) == WIDTH


def test_the_last_token_can_be_seen() -> None:
    lines = text([curve("few", Schedule.from_keeps([9999, 1, 0]))], "#")
    assert [len(line.split()) - 2 for line in lines] == [2, 1, 0]


def test_runs_meet_and_end_with_the_last_layer() -> None:
    labels = [line.removeprefix("layers").split()[0] for line in text([FITPRUNE], "#")]
    runs = [tuple(map(int, label.split("-"))) for label in labels]
    layers = [layer for run in runs for layer in range(run[0], run[-1] + 1)]
    assert layers == list(range(32))


def test_without_a_model_shares_are_drawn_and_bare_numbers_only_said() -> None:
    assert [len(bars(line)) for line in text([SHARES], "#")] == [1, 1, 1, 1]
    assert text([SHARES], "#")[-1].split()[:2] == ["24-", "12.5%"]
    lines = text([curve("x", Schedule.sparsevlm())], "#")
    assert [len(bars(line)) for line in lines] == [1, 0, 0, 0]
    assert lines[-1].split() == ["16-", "110"]


def test_two_curves_stand_side_by_side() -> None:
    head, *lines = text([FASTV, FITPRUNE], "#")
    assert head.split() == ["fastv", "fitprune"]
    assert len(lines) == len(text([FITPRUNE], "#"))
    assert lines[2].split()[1::2] == ["288", "529"]
    shorter = curve("short", Schedule.from_keeps([4, 2]))
    longer = curve("long", Schedule.from_keeps([4, 2, 2, 1]))
    assert [len(bars(line)) for line in text([shorter, longer], "#")[1:]] == [2, 2, 1, 1]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9999), min_size=1, max_size=60), min_size=1, max_size=4))
def test_what_is_drawn_fits_a_terminal_and_is_what_is_kept(lists: list[list[int]]) -> None:
    curves = []
    for i, drawn in enumerate(lists):
        tokens = max(*drawn, 1)
        keeps = sorted([tokens, *drawn], reverse=True)
        curves.append(curve(f"schedule {i}", Schedule.from_keeps(keeps)))
    lines = text(curves, "#")
    assert max(map(len, lines)) <= WIDTH
    for line in lines[len(curves) > 1 :]:
        first, *_ = re.findall(r"\d+", line)
        drawing = [(str(c.steps.at(int(first))), c) for c in curves]
        present = [keep for keep, c in drawing if int(first) < (c.steps.layers or 0)]
        body = re.sub(r"^\s*(?:layers )?\d+(?:-\d*)?", "", line)
        assert re.findall(r"\d+", body) == present


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_shows_every_curve(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"curves.{suffix}"
    picture([FASTV, FITPRUNE, SHARES], file)
    if suffix == "png":
        with Image.open(file) as image:
            colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
            assert image.width > 800
        assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours
    else:
        root = ElementTree.parse(file).getroot()
        lines = [node for node in root.iter() if node.get("id", "").startswith("line2d")]
        assert len(lines) >= 3
        assert "<!-- fitprune -->" in file.read_text(encoding="utf-8")


def test_a_picture_that_cannot_be_is_refused(tmp_path: Path) -> None:
    unknown = curve("sparse", Schedule.sparsevlm())
    for curves, file in (
        ([FASTV], tmp_path / "curves.jpg"),
        ([FASTV], tmp_path / "curves"),
        ([FASTV], tmp_path / "no" / "folder.png"),
        ([unknown], tmp_path / "curves.png"),
    ):
        with pytest.raises(InputError) as caught:
            picture(curves, file)
        assert caught.value.hint
        assert caught.value.where
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError, match="matplotlib") as caught:
        picture([FASTV], tmp_path / "curves.png")
    assert "pip install" in caught.value.hint


def test_text_is_drawn_without_heavy_wheels() -> None:
    probe = "import sys, vtr_export.drawing; print({'numpy', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
