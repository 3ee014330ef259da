"""Calibration sets: what is read, what is drawn, and what is refused by line."""

import hashlib
import json
import random
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vtr_export.errors import CalibrationError
from vtr_export.search.questions.calibration import (
    CalibrationSet,
    Question,
    overlap,
    refuse_overlap,
)

SAMPLE = Path(__file__).parents[1] / "samples" / "digits"


def paint(path: Path, value: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value // 2, 255 - value)).save(path)
    return str(path)


def write(folder: Path, *lines: object, name: str = "questions.jsonl") -> Path:
    """Dicts as JSON, text and bytes as they are; ``1.png`` to ``3.png`` are there."""
    for number in (1, 2, 3):
        paint(folder / f"{number}.png", 60 * number)
    raw = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    encoded = [line.encode() if isinstance(line, str) else line for line in raw]
    file = folder / name
    file.write_bytes(b"\n".join(encoded) + b"\n")
    return file


def row(image: object = "1.png", question: object = "how many?", answers: object = ("3",)) -> dict:
    listed = list(answers) if isinstance(answers, tuple) else answers
    return {"image": image, "question": question, "answers": listed}


def refusal(path: Path, **options: object) -> CalibrationError:
    with pytest.raises(CalibrationError) as caught:
        CalibrationSet.load(path, **options)
    return caught.value


def test_a_line_is_images_a_text_and_answers(tmp_path: Path) -> None:
    file = write(tmp_path, row(), {**row(["1.png", "2.png"], "which?", ("a", "a", "b")), "id": 7})
    one, two = sorted(CalibrationSet.load(file).questions, key=lambda q: q.where)
    assert one.images == (tmp_path / "1.png",)
    assert (one.text, one.answers, one.where) == ("how many?", ("3",), f"{file}:1")
    assert two.images == (tmp_path / "1.png", tmp_path / "2.png")
    assert two.answers == ("a", "a", "b")
    content = (tmp_path / "2.png").read_bytes()
    assert two.image_sha256[1] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "line",
    [
        {"images": ["1.png"], "question": "how many?", "answers": ["3"]},
        {"images": "1.png", "question": "how many?", "answer": "3"},
        {"image": ["1.png"], "question": "how many?", "answers": "3"},
        {"kind": {"a": [1]}, **row()},
    ],
)
def test_one_image_and_one_answer_may_be_written_several_ways(tmp_path: Path, line: dict) -> None:
    (plain,) = CalibrationSet.load(write(tmp_path, row())).questions
    (other,) = CalibrationSet.load(write(tmp_path, line)).questions
    assert other == plain


def test_a_folder_stands_for_its_only_file(tmp_path: Path) -> None:
    file = write(tmp_path, row())
    (tmp_path / "._questions.jsonl").write_bytes(b"\0\5\26\7")  # macOS leaves such files
    found = CalibrationSet.load(tmp_path)
    assert found.questions == CalibrationSet.load(file).questions
    assert found.name == tmp_path.name
    write(tmp_path, row(), name="more.jsonl")
    assert "more.jsonl, questions.jsonl" in refusal(tmp_path).message


def test_a_byte_order_mark_and_empty_lines_do_no_harm(tmp_path: Path) -> None:
    file = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(row()).encode(), "", "  ", row("2.png"))
    places = {question.where for question in CalibrationSet.load(file).questions}
    assert places == {f"{file}:1", f"{file}:4"}


def test_the_sample_s_questions_load() -> None:
    found = CalibrationSet.load(SAMPLE)
    assert len(found) == 128
    assert len({question.image_sha256 for question in found.questions}) == 64


BAD = {
    "not JSON": ('{"image": "1.png", ', "not JSON"),
    "a list": ("[1, 2]", "not a JSON object"),
    "Python": ("{'image': '1.png'}", "not JSON"),
    "too deep": ("[" * 100_000, "not JSON"),
    "a number of many digits": ('{"id": ' + "9" * 5000 + "}", "not JSON"),
    "Latin-1": ('{"question": "où?"}'.encode("latin-1"), "UTF-8"),
    "half a character": (r'{"image": "1.png", "question": "\ud83d", "answers": ["3"]}', "UTF-8"),
    "a key twice": ('{"image": "1.png", "image": "2.png", "question": "how?"}', "twice"),
    "no question": ({"image": "1.png", "query": "how?"}, "'query'"),
    "an empty question": (row(question=""), "no question"),
    "a blank question": (row(question=" \n"), "question"),
    "a question that is none": (row(question=["how?"]), "a list"),
    "no image": ({"question": "how?", "answers": ["3"]}, "no image"),
    "no images": ({"images": [], "question": "how?", "answers": ["3"]}, "no image"),
    "an image by number": (row(image=1), "'image' holds 1"),
    "image and images": ({**row(), "images": ["2.png"]}, "keep one"),
    "no answers": ({"image": "1.png", "question": "how?"}, "no answers"),
    "an empty list of answers": (row(answers=[]), "no answers"),
    "an empty answer": (row(answers=("3", " ")), "empty"),
    "an answer that is no text": (row(answers=[3]), "'answers' holds 3"),
    "answer and answers": ({**row(), "answer": "3"}, "keep one"),
    "a missing image": (row("4.png"), "4.png: no such file"),
    "a folder as image": (row("."), "folder"),
    "an empty path": (row(""), "not a path"),
    "a path with a NUL": (row("a\0b"), "not a path"),
    "an endless name": (row("a" * 5000), "cannot be read"),
    "an address": (row("https://example.com/1.png"), "not fetched"),
    "an inline image": (row("data:image/png;base64,iVBORw0KGgo="), "not fetched"),
    "a way out of the folder": (row("images/../../1.png"), "leaves"),
    "no image file": (row("questions.jsonl"), "not an image"),
}


@pytest.mark.parametrize(("line", "words"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named(tmp_path: Path, line: object, words: str) -> None:
    file = write(tmp_path, row("3.png", "good?"), "", line)
    error = refusal(file)
    assert words in error.message
    assert "line 3: " in error.message
    assert error.where == f"{file}:3"
    assert len(str(error)) < 1000


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "checksum":
        content[-20] ^= 1
        path.write_bytes(content)
    elif kind == "bomb":
        Image.new("1", (12_000, 10_000)).save(path, "PNG")


PNG, JPEG = "bad.png", "bad.jpg"


@pytest.mark.parametrize(
    ("name", "kind"),
    [(PNG, "empty"), (PNG, "truncated"), (PNG, "checksum"), (PNG, "bomb"), (JPEG, "truncated")],
)
def test_a_damaged_image_is_named(tmp_path: Path, name: str, kind: str) -> None:
    noise = random.Random(0).randbytes(64 * 64 * 3)
    Image.frombytes("RGB", (64, 64), noise).save(tmp_path / name)
    file = write(tmp_path, row(name, "before?"), row())
    assert len(CalibrationSet.load(file)) == 2
    damage(tmp_path / name, kind)
    error = refusal(file)
    assert error.where == f"{file}:1"
    assert name in error.message
    assert ("pixels" in error.message) == (kind == "bomb")


def test_a_truncated_image_that_was_not_drawn_is_no_obstacle(tmp_path: Path) -> None:
    Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3)).save(
        tmp_path / "b.jpg"
    )
    file = write(tmp_path, row("b.jpg"), row("2.png"), row("3.png"))
    damage(tmp_path / "b.jpg", "truncated")
    drawn = [first_image(file, seed) for seed in range(20)]
    assert set(drawn) == {"refused", "2.png", "3.png"}


@pytest.mark.parametrize("kind", ["checksum", "bomb"])
def test_what_a_header_tells_is_told_whatever_is_drawn(tmp_path: Path, kind: str) -> None:
    paint(tmp_path / PNG, 1)
    damage(tmp_path / PNG, kind)
    file = write(tmp_path, row(), row(PNG))
    assert {refusal(file, limit=1, seed=seed).where for seed in range(9)} == {f"{file}:2"}


def first_image(file: Path, seed: int) -> str:
    """What is drawn alone; ``refused`` where b.jpg is at fault."""
    try:
        (question,) = CalibrationSet.load(file, limit=1, seed=seed).questions
    except CalibrationError as error:
        return "refused" if "b.jpg" in error.message else str(error)
    return question.images[0].name


def test_all_problems_are_counted_and_the_first_named(tmp_path: Path) -> None:
    bad = [row(f"{number}.png", f"{number}?") for number in range(11, 22)]
    file = write(tmp_path, row(), *bad[:2], "{", *bad[2:], {"image": "1.png"})
    error = refusal(file)
    assert error.where == f"{file}:2"
    assert "13 problems" in error.message
    named = [line.split(":")[0].strip() for line in error.message.splitlines()[1:6]]
    assert named == [f"line {number}" for number in range(2, 7)]
    assert "8 more" in error.message
    assert error.hint


def test_the_same_question_about_the_same_pixels_is_a_duplicate(tmp_path: Path) -> None:
    shutil.copy(paint(tmp_path / "1.png", 60), tmp_path / "copy.png")
    same = refusal(write(tmp_path, row(), row("2.png"), row("copy.png")))
    assert "line 3: asks what line 1 asks" in same.message
    other = refusal(write(tmp_path, row(), row("copy.png", answers=("4",))))
    assert "other answers" in other.message
    swapped = [row(["1.png", "2.png"]), row(["2.png", "1.png"]), row(["1.png"])]
    assert len(CalibrationSet.load(write(tmp_path, *swapped))) == 3


def test_without_labels_answers_may_be_missing_or_withheld(tmp_path: Path) -> None:
    lines = [{"image": "1.png", "question": "how?"}, row("2.png", answers=" "), row("3.png")]
    file = write(tmp_path, *lines)
    found = CalibrationSet.load(file, labels=False)
    assert sorted(question.answers for question in found.questions) == [(), (), ("3",)]
    assert "line 1: " in refusal(file).message
    assert "line 2: " in refusal(file).message


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    assert "no such" in refusal(tmp_path / "absent.jsonl").message
    assert "no JSONL" in refusal(tmp_path).message
    assert "no question" in refusal(write(tmp_path, "", " ")).message
    for limit in (0, -1):
        assert str(limit) in refusal(write(tmp_path, row()), limit=limit).message


def test_a_file_that_cannot_be_read_is_refused() -> None:
    unreadable = Path("/proc/self/mem")  # for root too
    error = refusal(unreadable)
    assert "cannot be read" in error.message
    assert error.where == str(unreadable)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for image in range(12):
        paint(folder / f"{image}.png", 10 * image)
    write_rows(folder, [row(f"{image}.png", f"{n}?") for image in range(12) for n in range(5)])
    return folder


def write_rows(folder: Path, rows: list[dict]) -> None:
    lines = "".join(json.dumps(line) + "\n" for line in rows)
    (folder / "questions.jsonl").write_text(lines, encoding="utf-8")


@given(
    seed=st.integers(-5, 2**70), limit=st.integers(1, 70), order=st.randoms(use_true_random=False)
)
def test_a_draw_depends_on_the_seed_and_not_on_the_order(
    many: Path,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    limit: int,
    order: random.Random,
) -> None:
    found = CalibrationSet.load(many, limit=limit, seed=seed)
    moved = tmp_path_factory.mktemp("moved")
    lines = (many / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    order.shuffle(rows)
    write_rows(
        moved, [line | {"image": str(many / line["image"]), "answers": ["x"]} for line in rows]
    )
    again = CalibrationSet.load(moved, limit=limit, seed=seed)
    assert [(q.asked, q.text) for q in again.questions] == [
        (q.asked, q.text) for q in found.questions
    ]
    assert len(found) == min(limit, 60)
    larger = CalibrationSet.load(many, limit=limit + 1, seed=seed)
    assert set(found.questions) <= set(larger.questions)
    images = [question.image_sha256 for question in found.questions]
    changes = sum(a != b for a, b in pairwise(images))
    assert changes == len(set(images)) - 1  # an image's questions are neighbours


def test_another_seed_draws_others_from_everywhere(many: Path) -> None:
    drawn = [set(texts_of(CalibrationSet.load(many, limit=10, seed=seed))) for seed in range(40)]
    assert len({frozenset(one) for one in drawn}) == 40
    assert len(set.union(*drawn)) == 60  # each is left out 40 times with chance (5 / 6) ** 40


def texts_of(found: CalibrationSet) -> list[str]:
    return [question.asked for question in found.questions]


def test_the_hash_is_of_content_alone(tmp_path: Path) -> None:
    def sha256(*lines: dict, seed: int = 0) -> str:
        return CalibrationSet.load(write(tmp_path, *lines), seed=seed).sha256

    shutil.copy(paint(tmp_path / "1.png", 60), tmp_path / "renamed.png")
    plain = sha256(row(), row("2.png"))
    assert plain == sha256(row("2.png"), row("renamed.png"), seed=9)
    changed = [row("3.png"), row(question="how many"), row(answers=("4",)), row(answers=("3", "3"))]
    others = {sha256(line, row("2.png")) for line in changed} | {sha256(row())}
    assert len(others | {plain}) == 6


def test_the_hash_is_the_same_in_every_process() -> None:
    code = (
        "import sys; from vtr_export.search.questions.calibration import CalibrationSet as S; "
        "found = S.load(sys.argv[1], limit=9, seed=3); "
        "print(found.sha256, *(question.sha256 for question in found.questions))"
    )
    found = CalibrationSet.load(SAMPLE, limit=9, seed=3)
    printed = subprocess.run(
        [sys.executable, "-c", code, str(SAMPLE)], capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == [found.sha256, *(q.sha256 for q in found.questions)]


def test_evaluation_questions_are_never_calibration_questions(tmp_path: Path) -> None:
    first = CalibrationSet.load(write(tmp_path / "a", row(), row("2.png"), row("3.png")))
    other = [row("1.png", answers=("4",)), row("2.png", "why?"), row("3.png")]
    second = CalibrationSet.load(write(tmp_path / "b", *other))
    shared: tuple[Question, ...] = overlap(second, first)
    file = tmp_path / "b" / "questions.jsonl"
    assert {question.where for question in shared} == {f"{file}:1", f"{file}:3"}
    with pytest.raises(CalibrationError, match="2 of 3") as caught:
        refuse_overlap(first, second)
    assert f"{file}:3" in caught.value.message
    refuse_overlap(first, CalibrationSet.load(write(tmp_path / "c", row("2.png", "why?"))))


@pytest.fixture
def run_sample(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``calibration.py`` of the sample with these options."""
    pytest.importorskip("sklearn", reason="scenes are made of scikit-learn's digits")
    monkeypatch.syspath_prepend(str(SAMPLE))

    def run(*options: object) -> None:
        monkeypatch.setattr(sys, "argv", ["calibration.py", *map(str, options)])
        runpy.run_path(str(SAMPLE / "calibration.py"), run_name="__main__")

    return run


def test_the_sample_writes_sets_to_search_on_and_to_judge_by(
    run_sample: Callable[..., None], tmp_path: Path
) -> None:
    run_sample("--out", tmp_path / "search", "--questions", 50)
    run_sample("--out", tmp_path / "judge", "--questions", 50, "--evaluation")
    search, judge = (CalibrationSet.load(tmp_path / name) for name in ("search", "judge"))
    assert len(search) == len(judge) == 50
    assert len({question.image_sha256 for question in search.questions}) == 9
    assert len({question.image_sha256 for question in judge.questions}) == 50
    refuse_overlap(search, judge)
    refuse_overlap(CalibrationSet.load(SAMPLE), judge)
    for found in (tmp_path / "search", tmp_path / "judge"):
        lines = (found / "questions.jsonl").read_text(encoding="utf-8").splitlines()
        kinds = [json.loads(line)["kind"] for line in lines]
        assert {kinds.count(kind) for kind in kinds} == {8, 9}


@pytest.mark.parametrize(
    "options", [["--seed", "1"], ["--seed", "3", "--evaluation"], ["--questions", "0"]]
)
def test_the_sample_refuses_what_would_not_be_a_set_of_its_own(
    run_sample: Callable[..., None], tmp_path: Path, options: list[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run_sample("--out", tmp_path / "out", *options)
    assert left.value.code == 2
    assert not (tmp_path / "out").exists()
