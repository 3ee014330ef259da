"""A session: what it counts, and what it reads once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vtr_export.checkpoint import read_model_facts
from vtr_export.errors import InputError
from vtr_export.search import session
from vtr_export.search.evaluators import torch_model
from vtr_export.search.session import Session, Setup, check_family
from vtr_export.search.workers import pool, ray_pool

DIGITS = Path(__file__).parents[1] / "samples" / "digits"
MODEL, QUESTIONS = DIGITS / "model", DIGITS / "questions.jsonl"


def setup_of(folder: Path, **options: Any) -> Setup:
    return Setup(str(MODEL), QUESTIONS, folder / "l", limit=4, max_new_tokens=2, **options)


@pytest.fixture
def long_questions(tmp_path: Path) -> Path:
    """Held out: an image that no calibration question shows, and many words."""
    drawn = {
        question.images[0].name for question in Session(setup_of(tmp_path)).calibration.questions
    }
    other = next(path for path in sorted((DIGITS / "images").iterdir()) if path.name not in drawn)
    held = tmp_path / "held.jsonl"
    line = {"image": str(other), "question": "which digit is red? " * 20, "answers": ["1"]}
    held.write_text(json.dumps(line))
    return held


def test_held_out_questions_do_not_change_what_a_schedule_costs(
    long_questions: Path, tmp_path: Path
) -> None:
    with Session(setup_of(tmp_path)) as alone:
        candidate = alone.space.step(2, 18, alone.space.scores[0])
        expected = alone.workload, alone.flops_share(candidate)
    with Session(setup_of(tmp_path, evaluation=long_questions)) as session:
        assert (session.workload, session.flops_share(candidate)) == expected
        assert session.held_out is not None
        session.runner.measure([candidate])
        before = session.runner.decoder_flops_naive
        session.held_out.measure([candidate])
        assert (
            session.held_out.decoder_flops_naive > 1.2 * before / 4
        )  # one question, but a long one


def test_workers_on_ray_are_told_the_hash_that_names_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, told = list[Path](), list[Any]()
    whole = torch_model.hash_folder

    def counted(folder: Path) -> str:
        hashed.append(folder)
        return whole(folder)

    def on_ray(make: Any, *, fingerprint: Any, **_: Any) -> pool.Pool:
        told.append(fingerprint)
        return pool.Inline(make())

    monkeypatch.setattr(torch_model, "hash_folder", counted)
    monkeypatch.setattr(ray_pool, "RayPool", on_ray)
    with Session(setup_of(tmp_path, on_ray=True)) as session:
        assert [one["model"] for one in told] == [session.identity()["model"]]
    assert len(hashed) == 1


def test_a_model_that_evaluators_do_not_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = read_model_facts(MODEL)
    check_family(MODEL, facts)
    with pytest.raises(InputError, match="see each other"):
        check_family(MODEL, replace(facts, attends="images"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    monkeypatch.setattr(session, "made_files", lambda folder: {"chat_template.jinja": ""})
    with pytest.raises(InputError, match="layout of its own"):
        check_family(tmp_path, facts)
