"""An artifact's graphs for TensorRT 10 lie beside its own, and pass its gates."""

import shutil
from pathlib import Path

import onnx
import onnxruntime
import pytest
from command import vtr

from vtr_export import tensorrt_10
from vtr_export.errors import AnalysisError
from vtr_export.lowering import SUFFIX, lower_artifact
from vtr_export.manifest import Manifest
from vtr_export.passes import decompose


@pytest.fixture
def artifact(artifact_fp16: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact_fp16, tmp_path / "artifact"))


def test_lowered_graphs_share_the_weights_and_pass_every_gate(artifact: Path) -> None:
    before = {file.name: file.stat().st_size for file in (artifact / "onnx").iterdir()}
    gates = lower_artifact(artifact, Manifest.load(artifact))
    asked = {f"tensorrt-10.{name}.cosine" for name in ("forced.prefill", "free.decode")}
    assert {gate.name for gate in gates} >= asked
    assert all(gate.passed for gate in gates), [gate for gate in gates if not gate.passed]
    new = {file.name for file in (artifact / "onnx").iterdir()} - set(before)
    assert len(new) == 3
    assert all(name.endswith(SUFFIX) for name in new)
    for name in new:
        file = artifact / "onnx" / name
        onnx.checker.check_model(file, full_check=True)
        own = onnxruntime.InferenceSession(file.with_name(name.replace(SUFFIX, ".onnx")))
        session = onnxruntime.InferenceSession(file)
        for ports in ("get_inputs", "get_outputs"):
            mine, theirs = ([p.name for p in getattr(s, ports)()] for s in (session, own))
            assert mine == theirs


def test_a_wrong_lowering_fails_a_gate(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "LOWEST", 0.0)  # what is masked is seen
    gates = lower_artifact(artifact, Manifest.load(artifact))
    assert not all(gate.passed for gate in gates)


def test_a_graph_that_would_not_parse_is_refused(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(tensorrt_10.OPERATORS, "TopK")  # type: ignore[arg-type]  # a literal dict
    with pytest.raises(AnalysisError, match="TopK"):
        lower_artifact(artifact, Manifest.load(artifact))


def test_an_export_for_tensorrt_10_publishes_them(
    checkpoint_fp16: Path, artifact_fp16: Path, shared_traces: None, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = vtr("export", "-s", artifact_fp16 / "schedule.yaml", "-m", checkpoint_fp16, "-o", out,
               "--dtype", "fp16", "--no-verify", "--target", "tensorrt-10", "--json")  # fmt: skip
    assert done.code == 0, done.err
    lowered = {name for name in done.json["files"] if name.endswith(SUFFIX)}
    assert len(lowered) == 3
    assert lowered <= Manifest.load(out).files.keys()
