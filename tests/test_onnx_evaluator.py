"""The tunable artifact answers as the PyTorch reference does, and a search on it ends the same."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from command import vtr

from vtr_export.errors import ArtifactError, InputError
from vtr_export.schedule import Schedule
from vtr_export.search.candidate import Candidate, Score
from vtr_export.search.evaluator import Evaluator, Shard
from vtr_export.search.evaluators.onnx_evaluator import OnnxEvaluator
from vtr_export.search.evaluators.torch_evaluator import TorchEvaluator
from vtr_export.search.gsearch import Found, floors, gsearch, levels_of
from vtr_export.search.latency import open_schedule
from vtr_export.search.ledger.ledger import Ledger
from vtr_export.search.questions.calibration import CalibrationSet, Question
from vtr_export.search.questions.metrics import get_metric
from vtr_export.search.runner import Runner
from vtr_export.search.workers.pool import Inline

DIGITS = Path(__file__).parents[1] / "samples" / "digits"
SCORE = Score(query="text")
ROUNDING = 1e-4  # nats: what two runtimes make of the same candidate

Blocks = Sequence[Sequence[Question]]


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    """48 of the sample's questions."""
    questions = CalibrationSet.load(DIGITS / "questions.jsonl", limit=48).questions
    return questions[:32], questions[32:]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample with a cut before every layer but the first."""
    from vtr_export.exporter import export
    from vtr_export.families import read_facts
    from vtr_export.runtime.json_files import read_json
    from vtr_export.search.candidate import Space

    config = DIGITS / "model" / "config.json"
    space = Space(read_facts(read_json(config), str(config)))
    out = tmp_path_factory.mktemp("tunable") / "artifact"
    export(open_schedule(space, SCORE), DIGITS / "model", out, tunable=True, verify="none")
    return out


def both(metric: str, artifact: Path, blocks: Blocks) -> tuple[TorchEvaluator, OnnxEvaluator]:
    chosen = get_metric(metric)
    return (
        TorchEvaluator(DIGITS / "model", blocks, chosen, max_new_tokens=4),
        OnnxEvaluator(artifact, blocks, chosen, max_new_tokens=4),
    )


def search(evaluator: Evaluator, blocks: Blocks, metric: str, ledger: Path) -> Found:
    hashes = [[question.sha256 for question in block] for block in blocks]
    space = evaluator.space
    with Ledger.open(ledger, evaluator.fingerprint()) as kept:
        runner = Runner(Inline(evaluator), space, flops, hashes, get_metric(metric), kept)
        unpruned = runner.unpruned().metric
        assert unpruned is not None
        floor = floors(unpruned, 0.05, range(1, space.layers), "even")
        return gsearch(runner, space, SCORE, floor=floor, levels=levels_of(space.parts, 12))


def flops(candidate: Candidate, shard: Shard) -> int:
    return sum(candidate.keeps) * len(shard)


def whole(blocks: Blocks, block: int) -> Shard:
    hashes = tuple(question.sha256 for question in blocks[block])
    return Shard.of(block, tuple(reversed(range(len(hashes)))), hashes[::-1])


def test_a_search_on_either_finds_the_same_schedule(
    artifact: Path, blocks: Blocks, tmp_path: Path
) -> None:
    torch, onnx = both("exact", artifact, blocks)
    found = search(torch, blocks, "exact", tmp_path / "torch.db")
    assert len(set(found.candidate.keeps)) > 2  # it stopped on the way, more than once
    other = search(onnx, blocks, "exact", tmp_path / "onnx.db")
    assert other.candidate == found.candidate
    assert other.tries == found.tries


@pytest.mark.parametrize("metric", ["agreement", "kl", "exact"])
def test_every_question_scores_the_same(metric: str, artifact: Path, blocks: Blocks) -> None:
    torch, onnx = both(metric, artifact, blocks)
    unpruned = torch.unpruned(1), onnx.unpruned(1)
    assert np.allclose(unpruned[0].metric, unpruned[1].metric)
    assert np.allclose(unpruned[0].margin, unpruned[1].margin, atol=1e-3)
    candidate = onnx.space.step(1, 24, SCORE).with_tail(3, 4)
    expected, got = (each.evaluate(candidate, whole(blocks, 1)) for each in (torch, onnx))
    assert np.allclose(expected.kl, got.kl, atol=ROUNDING)
    assert expected.kl.max() > 1000 * ROUNDING  # the cut is felt
    assert metric == "kl" or 0 < expected.metric.mean() < 1  # some questions are lost
    assert np.allclose(expected.metric, got.metric, atol=ROUNDING)
    assert np.isclose(got.decoder_flops, expected.decoder_flops, rtol=0.02)  # nothing was held yet


def test_an_artifact_says_what_it_lacks_and_how_to_get_it(
    checkpoint: Path, exported: tuple[Path, object], shared_traces: None, tmp_path: Path
) -> None:
    from vtr_export.exporter import export

    metric = get_metric("kl")
    with pytest.raises(ArtifactError, match="frozen"):
        OnnxEvaluator(exported[0], ((),), metric)
    export(Schedule.fastv(1, "50%"), checkpoint, tmp_path / "one", tunable=True, verify="none")
    with pytest.raises(ArtifactError, match="no cut before layers 2") as caught:
        OnnxEvaluator(tmp_path / "one", ((),), metric)
    command = shlex.split(caught.value.hint.partition(";")[0])
    out = tmp_path / command.pop()
    assert vtr(*command[1:], out).code == 0
    export(out, checkpoint, tmp_path / "all", tunable=True, verify="none")
    opened = OnnxEvaluator(tmp_path / "all", ((),), metric)
    assert [str(score) for score in opened.space.scores] == ["from next, query last, heads mean"]
    prefill = Schedule.load(out).prefill.model_dump(by_alias=True, exclude={"keep"})
    whole_layer = prefill | {"score": {"rule": "self_cross", "query": "text"}}
    other = Schedule.from_data({"version": 1, "prefill": whole_layer})
    export(other, checkpoint, tmp_path / "other", tunable=True, verify="none")
    with pytest.raises(ArtifactError, match="'rule': 'self_cross'"):
        OnnxEvaluator(tmp_path / "other", ((),), metric)


def test_another_score_than_the_artifacts_is_refused(artifact: Path, blocks: Blocks) -> None:
    evaluator = OnnxEvaluator(artifact, blocks, get_metric("kl"), max_new_tokens=4)
    candidate = evaluator.space.step(2, 9, Score())
    with pytest.raises(InputError, match="query text, heads mean, not by"):
        evaluator.evaluate(candidate, whole(blocks, 1))


def test_a_latency_is_refused_before_an_artifact_is_loaded(artifact: Path, tmp_path: Path) -> None:
    done = vtr(
        *("search", "psigmoid", "--model", artifact, "--calibration", DIGITS / "questions.jsonl"),
        *("--limit", 4, "--budget", "latency=0.5@onnxruntime-cpu", "--out", tmp_path / "s.yaml"),
    )
    assert done.code == 2
    assert "this is an artifact" in done.err
    assert "the model\n" not in done.err, "it is neither hashed nor loaded"
    assert not list(tmp_path.iterdir())


def test_the_command_takes_an_artifact_as_it_takes_a_checkpoint(
    artifact: Path, tmp_path: Path
) -> None:
    found = {}
    for name, model in (("checkpoint", DIGITS / "model"), ("artifact", artifact)):
        done = vtr(
            *("search", "gsearch", "--model", model, "--calibration", DIGITS / "questions.jsonl"),
            *("--limit", 32, "--tolerance", 0.07, "--step", 24, "--max-new-tokens", 4),
            *("--score", "previous/text/mean", "--out", tmp_path / f"{name}.yaml", "--json"),
        )
        assert done.code == 0, done.err
        found[name] = done.json
    assert found["artifact"]["keep"] == found["checkpoint"]["keep"]
    assert found["artifact"]["score"] == found["checkpoint"]["score"]
    assert "\nmodel:" not in (tmp_path / "artifact.yaml").read_text()
    budget = ("--budget", "latency=0.5@onnxruntime-cpu", "--limit", 8, "--out", tmp_path / "p.yaml")
    questions = ("--calibration", DIGITS / "questions.jsonl")
    done = vtr("search", "psigmoid", "--model", artifact, *questions, *budget)
    assert done.code == 2
    assert "search on the checkpoint" in done.err
