"""The acceptance command: a CPU runs it whole, and builds what it cannot run; a failure is told."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="answers are compared with transformers'")

ROOT = Path(__file__).parents[1]
SAMPLES, DIGITS = ROOT / "samples", ROOT / "samples" / "digits"
QUESTIONS = 3


@dataclass(frozen=True)
class Ended:
    """What one call of the command left."""

    code: int
    out: str
    report: dict[str, Any]
    page: str


def accept(folder: Path, *options: str, **environment: str) -> Ended:
    command = [sys.executable, str(SAMPLES / "acceptance.py"), *options, "--out", str(folder)]
    command += ["--schedule", str(DIGITS / "gsearch.yaml")]
    env = os.environ | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (folder / "report.json").is_file(), done.stderr
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    return Ended(done.returncode, done.stdout, report, page)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("acceptance")


@pytest.fixture(scope="module")
def executed(folder: Path) -> Ended:
    questions = ("--questions", str(DIGITS / "questions.jsonl"), "--limit", str(QUESTIONS))
    return accept(folder, *questions, "--dtype", "fp16", "--record", str(folder / "record.json"))


def test_a_cpu_runs_it_from_the_checkpoint_to_the_page(executed: Ended) -> None:
    assert (executed.code, executed.report["verdict"]) == (0, "passed")
    run = executed.report["runs"]["fp16"]
    assert run["export"]["verified"]
    assert run["build"] is None
    assert all(gate["passed"] for gate in run["verify"]["gates"])
    answers = run["answers"]
    assert answers["questions"] == answers["alike"] == answers["right"] == QUESTIONS
    assert answers["cosine"] > 0.999
    assert [row["known"] for row in answers["shown"]] == known(QUESTIONS)
    assert run["times"]["prefill_speedup"] == pytest.approx(
        run["times"]["prefill_ms_unpruned"] / run["times"]["prefill_ms"]
    )


def known(count: int) -> list[list[str]]:
    lines = (DIGITS / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["answers"] for line in lines[:count]]


def test_the_page_needs_nothing_else_and_shows_what_was_found(executed: Ended) -> None:
    page = executed.page
    assert page.count("<svg") == 1
    assert 'src="' not in page
    assert "url(http" not in page
    assert f"{QUESTIONS} of {QUESTIONS}" in page
    for row in executed.report["runs"]["fp16"]["answers"]["shown"]:
        assert row["question"] in page


def test_a_record_says_what_the_report_says_in_short(executed: Ended, folder: Path) -> None:
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert record["verdict"] == executed.report["verdict"]
    assert record["runs"]["fp16"]["answers"]["right"] == QUESTIONS
    assert "shown" not in record["runs"]["fp16"]["answers"]
    assert set(record["runs"]["fp16"]) == set(executed.report["runs"]["fp16"])


def test_engines_are_built_and_nobody_claims_they_ran(executed: Ended, folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="the builder's wheel")
    options = ("--resume", "--dtype", "fp16", "--target", "tensorrt-rtx", "--sm", "89")
    ended = accept(folder, *options, CUDA_VISIBLE_DEVICES="")  # no GPU, whatever is here
    run = ended.report["runs"]["fp16"]
    assert ended.code == 3
    assert ended.report["verdict"].startswith("built, not executed: ")
    assert ended.report["verdict"] in ended.out
    assert run["build"]["sms"] == [89]
    assert [engine["component"] for engine in run["build"]["engines"]] == [
        "vision_encoder",
        "decoder",
    ]
    assert run["answers"] is run["times"] is None
    assert run["verify"]["not_checked"]
    assert run["export"]["seconds"] == executed.report["runs"]["fp16"]["export"]["seconds"]
    assert "as transformers" not in ended.page


def test_a_step_that_fails_is_told_and_ends_there(executed: Ended, folder: Path) -> None:
    """TensorRT-RTX does not serve SM 9.0; the artifact is the one that is there."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="the builder's wheel")
    ended = accept(folder, "--resume", "--dtype", "fp16", "--target", "tensorrt-rtx", "--sm", "90")
    run = ended.report["runs"]["fp16"]
    assert (ended.code, ended.report["verdict"]) == (1, "failed")
    assert run["build"] is run["verify"] is None
    assert "9.0" in run["failed"]
    assert run["failed"] in ended.page.replace("&#39;", "'")


# --- what is compared ---------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SAMPLES / "support"))
    import answers

    return answers


def test_only_prompts_that_kept_the_same_are_compared_by_logits(answers: ModuleType) -> None:
    """Of three: alike; a near tie; another token, another answer."""
    scores = (np.array([0.4, 0.3, 0.299, 0.001], np.float32),)
    theirs = answers.Said("yes", np.array([1.0, 0.0]), (np.array([0, 1]),), scores)
    near = replace(theirs, kept=(np.array([0, 2]),), logits=np.array([0.0, 1.0]), scores=())
    far = replace(near, kept=(np.array([0, 3]),), text="no")
    mine = [replace(theirs, scores=()), near, far]
    asked = [answers.Asked(Path("a.png"), "?", ("yes",))] * 2 + [answers.Asked(Path("a.png"), "?")]
    found = answers.compare(asked, mine, [(theirs, "yes"), (theirs, "no"), (theirs, "no")], 0.01)
    counts = {name: value for name, value in found.items() if isinstance(value, int)}
    assert counts == {
        "questions": 3, "with_known_answer": 2, "right": 2, "alike": 2, "alike_whole": 2,
        "same_keep_sets": 1, "near_ties": 1,
    }  # fmt: skip
    assert (found["cosine"], found["difference"]) == (1.0, 0.0)


def test_survivors_are_followed_through_every_cut(answers: ModuleType) -> None:
    """Text, four vision tokens, text: the first cut keeps tokens 1 and 3, the second token 3."""
    vision = np.array([1, 2, 3, 4])
    kept = (np.array([[0, 2, 4, 5]]), np.array([[0, 2, 3]]))
    found = answers._survivors(vision, kept, 6)
    assert [each.tolist() for each in found] == [[1, 3], [3]]
