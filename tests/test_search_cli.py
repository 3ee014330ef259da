"""``vtr search`` as users and scripts meet it, on the trained sample."""

import json
import shutil
import signal
import subprocess
import sys
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Done, vtr

from vtr_export.search import methods
from vtr_export.search.candidate import Candidate, Score
from vtr_export.search.latency import LatencyTable
from vtr_export.search.session import Session, Setup

DIGITS = Path(__file__).parents[1] / "samples" / "digits"
MODEL, QUESTIONS = DIGITS / "model", DIGITS / "questions.jsonl"
SCORE, TOKENS, LAYERS = "previous/text/mean", 144, 8
COUNT, STEP = 40, 72
TOLERANCE = 2 / COUNT
GIVEN = ("--model", MODEL, "--calibration", QUESTIONS, "--limit", COUNT, "--max-new-tokens", 4)


def gsearch(folder: Path, *more: object) -> Done:
    base = ("search", "gsearch", *GIVEN, "--score", SCORE, "--tolerance", TOLERANCE)
    return vtr(*base, "--out", folder / "s.yaml", "--json", *more)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a finished search, and what it said."""
    folder = tmp_path_factory.mktemp("search")
    done = gsearch(folder, "--step", STEP, "--spend", "first", "--ranks")
    assert done.code == 0, done.err
    return folder, done.json


def test_scripts_find_what_they_need(found: tuple[Path, Any]) -> None:
    folder, said = found
    assert said["schedule"] == str(folder / "s.yaml")
    assert 0 <= said["unpruned_metric"] - said["metric"] <= TOLERANCE + 1e-9
    assert said["evaluations"] > 2
    assert 0 < said["decoder_flops_spent"] < said["decoder_flops_naive"]
    assert said["flops_ratio"] == said["decoder_flops_spent"] / said["decoder_flops_naive"]
    assert 0 < said["schedule_flops"] < 1
    assert said["resumed"] is False


def test_the_schedule_compiles_and_says_where_it_comes_from(found: tuple[Path, Any]) -> None:
    folder, said = found
    data = yaml.safe_load((folder / "s.yaml").read_text())
    assert data["prefill"]["keep"] == said["keep"]
    score = {"from": "previous", "rule": "attention", "query": "text", "heads": "mean"}
    assert data["prefill"]["score"] == score
    origin = data["origin"]
    assert origin["method"] == "g-search"
    assert origin["complete"] is True
    assert origin["questions"] == COUNT
    assert len(origin["calibration"]) == len("sha256:") + 64
    plan = vtr("plan", "-s", folder / "s.yaml", "--json")  # it names its model itself
    assert plan.json["vision_tokens_per_layer"] == said["keep"]


def test_the_report_is_there(found: tuple[Path, Any]) -> None:
    page = (found[0] / "report.html").read_text()
    for section in ("G-Search", "Kendall", "svg"):
        assert section in page


def test_on_a_coarse_grid_it_is_exhaustive_search(found: tuple[Path, Any], tmp_path: Path) -> None:
    """Of all never-growing lists of keeps that pass, the first in lexical order."""
    levels = sorted(range(0, TOKENS + 1, STEP), reverse=True)
    lists = [(TOKENS, *keeps) for keeps in combinations_with_replacement(levels, LAYERS - 1)]
    setup = Setup(str(MODEL), QUESTIONS, tmp_path / "l", limit=COUNT, max_new_tokens=4)
    with Session(setup) as session:
        whole = session.unpruned.metric or 0.0
        candidates = [Candidate(keeps, Score(query="text"), TOKENS) for keeps in lists[1:]]
        measured = session.runner.measure(candidates)
    passing = [m.candidate.keeps for m in measured if (m.metric or 0) >= whole - TOLERANCE - 1e-9]
    assert 1 < len(passing) < len(lists)
    assert tuple(found[1]["keep"]) == min(passing)


def test_the_same_command_again_computes_nothing(found: tuple[Path, Any]) -> None:
    folder, said = found
    before = (folder / "s.yaml").read_text()
    again = gsearch(folder, "--step", STEP, "--spend", "first").json
    assert again["resumed"] is True
    same = ("keep", "metric", "kl", "evaluations", "decoder_flops_spent", "decoder_flops_naive")
    assert {name: again[name] for name in same} == {name: said[name] for name in same}
    assert (folder / "s.yaml").read_text() == before


def test_another_calibration_set_is_refused_with_the_difference(found: tuple[Path, Any]) -> None:
    folder, _ = found
    before = (folder / "s.yaml.ledger").read_bytes()
    done = gsearch(folder, "--seed", 1)
    assert done.code == 2
    assert "calibration was" in done.err
    assert "--ledger" in done.err
    assert (folder / "s.yaml.ledger").read_bytes() == before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_an_interrupted_search_leaves_its_best_and_goes_on(tmp_path: Path, stop: int) -> None:
    (tmp_path / "whole").mkdir()
    whole = gsearch(tmp_path / "whole", "--step", 16).json
    program = "from vtr_export.cli import main; main()"
    base = ("search", "gsearch", *GIVEN, "--score", SCORE, "--tolerance", TOLERANCE, "--step", 16)
    command = [sys.executable, "-c", program, *map(str, base), "--out", str(tmp_path / "s.yaml")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stderr is not None
    said = next(line for line in child.stderr if line.startswith("layer 2 keeps"))
    child.send_signal(stop)
    _, rest = child.communicate(timeout=120)
    assert child.returncode == 130, (said, rest)
    best = yaml.safe_load((tmp_path / "s.yaml").read_text())
    assert best["origin"]["complete"] is False
    assert best["prefill"]["keep"][:3] == whole["keep"][:3]
    again = gsearch(tmp_path, "--step", 16).json
    assert again["resumed"] is True
    assert again["keep"] == whole["keep"]


def test_interrupted_while_it_loads_it_writes_no_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Session) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_open", interrupted)
    done = gsearch(tmp_path)
    assert done.code == 130
    assert "goes on from here" in done.err
    assert not list(tmp_path.iterdir())


def refused(*arguments: object) -> Done:
    done = vtr("search", *arguments)
    assert done.code == 2, done.err
    assert "help:" in done.err
    assert "Traceback" not in done.err
    return done


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        ("gsearch", ("--tolerance", 0.02), "one of 40 questions"),
        ("gsearch", ("--tolerance", 0), "no share"),
        ("gsearch", ("--tolerance", 1.5), "no share"),
        ("gsearch", ("--tolerance", TOLERANCE, "--first-layer", "8"), "1 to 7"),
        ("gsearch", ("--tolerance", TOLERANCE, "--first-layer", "2,0"), "1 to 7"),
        ("gsearch", ("--tolerance", TOLERANCE, "--first-layer", "two"), "is no layer"),
        ("gsearch", ("--tolerance", TOLERANCE, "--step", 0), "of 144 tokens"),
        ("gsearch", ("--tolerance", TOLERANCE, "--step", 145), "of 144 tokens"),
        ("gsearch", ("--score", "first/word"), "no score"),
        ("psigmoid", ("--budget", "flops=0.01"), "ask for"),
        ("psigmoid", ("--budget", "tokens=0.1"), "ask for 0.125 or more"),
        ("psigmoid", ("--budget", "flops=0.5", "--trials", 0), "at least 1"),
        ("vtw", ("--first-layer", 8), "1 to 7"),
        ("vtw", ("--eta", -1), "eta is -1"),
    ],
)
def test_options_are_refused_before_the_model_is_read(
    method: str, options: tuple[object, ...], why: str, tmp_path: Path
) -> None:
    done = refused(method, *GIVEN, "--out", tmp_path / "s.yaml", *options)
    assert why in done.err
    assert "the model\n" not in done.err, "it is neither hashed nor loaded"
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "s.yaml")
    assert "no metric" in refused("gsearch", *GIVEN, *out, "--metric", "bleu").err
    assert "mkdir" in refused("gsearch", *GIVEN, "--out", tmp_path / "no" / "s.yaml").err
    bad = refused("psigmoid", *GIVEN, *out, "--budget", "flops=1.4").err
    assert "above 0, at most 1" in bad
    unlabelled = tmp_path / "q.jsonl"
    image = DIGITS / "images" / "24.png"
    unlabelled.write_text(json.dumps({"image": str(image), "question": "which digit is red?"}))
    given = ("--model", MODEL, "--calibration", unlabelled)
    assert "answers" in refused("gsearch", *given, *out).err
    assert not (tmp_path / "s.yaml").exists()


def test_the_cheapest_of_several_first_layers_is_taken(tmp_path: Path) -> None:
    alone = {}
    for first in ("1", "2", "3", "2,3,1"):
        out = tmp_path / first
        out.mkdir()
        done = gsearch(out, "--step", 24, "--first-layer", first, "--ledger", tmp_path / "ledger")
        alone[first] = done.json["schedule_flops"], done.json["keep"]
    assert alone["2,3,1"] == min(alone[first] for first in "123")
    assert len({tuple(keep) for _, keep in alone.values()}) > 1


def test_calibration_and_evaluation_must_differ(tmp_path: Path) -> None:
    done = refused("gsearch", *GIVEN, "--out", tmp_path / "s.yaml", "--evaluation", QUESTIONS)
    assert "are calibration questions" in done.err


def test_a_foreign_ledger_is_left_as_it_is(tmp_path: Path) -> None:
    foreign = tmp_path / "notes.db"
    foreign.write_bytes(b"not a database, but somebody's")
    given = ("gsearch", *GIVEN, "--out", tmp_path / "s.yaml", "--tolerance", TOLERANCE)
    assert "notes.db" in refused(*given, "--ledger", foreign).err
    assert foreign.read_bytes() == b"not a database, but somebody's"


def test_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'vtr-export[cluster]'")
    given = ("gsearch", *GIVEN, "--out", tmp_path / "s.yaml", "--tolerance", TOLERANCE)
    assert "127.0.0.1:9" in refused(*given, "--ray", "127.0.0.1:9").err


def test_psigmoid_meets_its_budget_and_is_compared(tmp_path: Path) -> None:
    small = ("--model", MODEL, "--calibration", QUESTIONS, "--limit", 24, "--max-new-tokens", 4)
    held = tmp_path / "held.jsonl"
    lines = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    drawn = vtr_questions(24)
    others = [line for line in lines if (line["image"], line["question"]) not in drawn][:16]
    shutil.copytree(DIGITS / "images", tmp_path / "images")
    held.write_text("\n".join(map(json.dumps, others)))
    done = vtr(
        *("search", "psigmoid", *small, "--score", SCORE, "--budget", "flops=0.3"),
        *("--trials", 9, "--out", tmp_path / "p.yaml", "--evaluation", held, "--json"),
    )
    assert done.code == 0, done.err
    said = done.json
    assert 0.28 < said["schedule_flops"] <= 0.3
    names = {row["name"] for row in said["compared"]}
    assert {"P-Sigmoid", "FastV", "PyramidDrop", "linear", "exponential"} <= names
    assert all(row["cost"] is None or row["cost"] <= 0.3 for row in said["compared"])
    assert said["held_out"]["rivals"][0]["name"] == "FastV"
    assert said["held_out"]["difference"]["questions"] == 16


def test_a_latency_is_said_as_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = LatencyTable(
        **{"backend": "onnxruntime-cpu", "runtime": "none", "dtype": "fp32", "threads": 1},
        **{"score": SCORE, "layers": LAYERS, "vision_tokens": TOKENS, "text_tokens": 20},
        **{"rows": (20, 164), "layer_ms": (0.2, 1.0), "cut_ms": (0.0, 0.0), "repeats": 1},
    )
    monkeypatch.setattr(methods, "measure", lambda *_, **__: table)
    monkeypatch.setattr(methods, "time_candidate", lambda *_, **__: (3.25, 7.5))
    done = vtr(
        *("search", "psigmoid", "--model", MODEL, "--calibration", QUESTIONS, "--limit", 4),
        *("--max-new-tokens", 4, "--score", SCORE, "--budget", "latency=4ms@onnxruntime-cpu"),
        *("--trials", 1, "--no-compare", "--out", tmp_path / "s.yaml"),
    )
    assert done.code == 0, done.err
    [line] = [line for line in done.out.splitlines() if line.startswith("prefill on")]
    assert line.startswith("prefill on onnxruntime-cpu: 3.25 ms, ")
    assert line.endswith(" predicted, unpruned 7.5")
    assert 3.8 < float(line.split()[-4]) <= 4


def vtr_questions(limit: int) -> set[tuple[str, str]]:
    """What a draw takes, as the file spells it."""
    from vtr_export.search.questions.calibration import CalibrationSet

    drawn = CalibrationSet.load(QUESTIONS, limit=limit).questions
    return {(f"images/{question.images[0].name}", question.text) for question in drawn}


def test_ranks_alone(tmp_path: Path) -> None:
    page = tmp_path / "ranks.html"
    given = ("--model", MODEL, "--calibration", QUESTIONS, "--limit", 4, "--picture", page)
    done = vtr("search", "--ranks", *given, "--json")
    assert done.code == 0, done.err
    assert len(done.json["tau"]) == LAYERS
    assert "svg" in page.read_text()


def test_vtw_withdraws_where_it_no_longer_shows(tmp_path: Path) -> None:
    given = ("--model", MODEL, "--calibration", QUESTIONS, "--limit", 8, "--max-new-tokens", 4)
    out = ("--out", tmp_path / "v.yaml", "--json")
    said = vtr("search", "vtw", *given, *out, "--eta", 0.5, "--first-layer", 1).json
    assert said["k"] == 1 or said["k"] > 1
    stages = yaml.safe_load((tmp_path / "v.yaml").read_text())["prefill"]["stages"]
    assert stages == [{"before_layer": said["k"], "keep": 0}]
    deep = vtr("search", "vtw", *given, *out, "--eta", 0.0, "--first-layer", 7)
    assert deep.code == 2
    assert "--eta" in deep.err
