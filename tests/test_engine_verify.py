"""``vtr verify ENGINE``: golden vectors replayed, bugs found, and what is not checked said so."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import verify_bugs
from command import vtr
from test_runtime_tensorrt import HAS_GPU, simulated, without_gpu

from vtr_export.engine_manifest import EngineManifest
from vtr_export.errors import ArtifactError, EngineError, InputError
from vtr_export.manifest import Manifest
from vtr_export.published import hash_files
from vtr_export.runtime.session import open_session
from vtr_export.verify.engine import (
    NO_TIES,
    EngineFindings,
    Opened,
    play_cases,
    replay,
    verify_engine,
)
from vtr_export.verify.gates import BARS
from vtr_export.verify.golden import load_golden

Verify = Callable[..., EngineFindings]
FOUND = {
    # bug: the gates that see it in an engine, which cannot be forced and runs in fp16
    "rope sign": ["keep_sets.cut.1"],
    "positions": ["forced.prefill.cosine", "forced.decode.cosine"],
    "decode mask": ["forced.decode.cosine"],
    "cached keys": ["forced.decode.cosine"],
    "padding": ["keep_sets.cut.0", "keep_sets.cut.1"],
    "worst tokens": ["keep_sets.cut.0", "keep_sets.cut.1"],
    "budget": ["keep_sets.counts"],
    "cut indices": ["keep_sets.counts"],
}


def spoil(artifact: Path, folder: Path, bug: verify_bugs.Bug) -> Path:
    """The artifact with a bug in its decoder."""
    copy = Path(shutil.copytree(artifact, folder))
    file = copy / "onnx" / f"{verify_bugs.DECODER}.onnx"
    model = ir.load(file)
    bug(model)
    ir.save(model, file)
    return copy


@pytest.fixture
def verified(
    engine_fp16: Path, artifact_fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Verify:
    """Verify the engine as if its plans were the artifact's graphs, with a bug or without."""

    def run(bug: str = "", *, rows: int = 2, artifact: Path | None = None) -> EngineFindings:
        graphs = artifact_fp16
        if bug:
            graphs = spoil(artifact_fp16, tmp_path / "spoilt", verify_bugs.PLANTED[bug][1])
        simulated(engine_fp16, graphs, monkeypatch, rows=rows)
        return verify_engine(engine_fp16, artifact=artifact)

    return run


def failed(found: EngineFindings) -> list[str]:
    return [gate.name for gate in found.gates if not gate.passed]


def test_a_right_engine_passes_in_both_modes(verified: Verify) -> None:
    found = verified()
    assert found.executed
    assert failed(found) == []
    assert [gate.name for gate in found.gates] == [
        "vision_encoder.cosine", "keep_sets.counts", "keep_sets.cut.0", "keep_sets.cut.1",
        "forced.prefill.cosine", "forced.decode.cosine", "forced.top1",
    ]  # fmt: skip
    assert found.not_checked == (NO_TIES,)
    assert "numbers of batch, single" in found.checked


@pytest.mark.parametrize(("bug", "status", "passed"), [("", 0, True), ("decode mask", 1, False)])
def test_the_exit_status_is_that_of_the_gates(
    bug: str, status: int, passed: bool, verified: Verify, engine_fp16: Path
) -> None:
    verified(bug)  # the plans stand for the same graphs below
    done = vtr("verify", engine_fp16, "--json")
    assert done.code == status
    assert (done.json["executed"], done.json["passed"]) == (True, passed)
    last = vtr("verify", engine_fp16).out.splitlines()[-1]
    assert last == "all 7 gates pass" if passed else "gates failed" in last


@pytest.mark.parametrize("bug", FOUND)
def test_a_planted_bug_fails_a_gate(bug: str, verified: Verify) -> None:
    assert set(FOUND[bug]) <= set(failed(verified(bug)))


def test_rows_that_keep_other_tokens_are_counted_not_compared(verified: Verify) -> None:
    """Padding that is seen changes the shorter row alone."""
    found = verified("padding")
    assert "logits of 1 of 3 rows: they keep other tokens than the reference" in found.not_checked
    assert not any(name.startswith("forced") for name in failed(found))


def test_equal_scores_are_asked_about_where_the_plugin_answers(
    artifact_fp16: Path, engine_fp16: Path, tmp_path: Path
) -> None:
    """ONNX Runtime's own sessions stand for the engine's: they order ties as the plugin does."""
    manifest = EngineManifest.load(engine_fp16)
    cases = [load_golden(engine_fp16 / "golden" / "single.npz")]
    wrong = spoil(artifact_fp16, tmp_path / "ties", verify_bugs.PLANTED["ties"][1])
    for folder, passes in ((artifact_fp16, True), (wrong, False)):
        vision, decoder = (
            open_session(folder / "onnx" / f"{name}.onnx")
            for name in ("vision_encoder", verify_bugs.DECODER)
        )
        table = open_session(engine_fp16 / manifest.embeddings)
        opened = Opened(vision, table, decoder, keep=None, cut_layers=(1, 2))
        answers, left_out = play_cases(opened, cases)
        gates, open_questions = replay(opened, answers, BARS["fp16"])
        assert (
            [gate.name for gate in gates if not gate.passed] == [] if passes else ["keep_sets.ties"]
        )
        assert left_out == open_questions == []


def test_a_case_beyond_the_profiles_is_named(verified: Verify) -> None:
    found = verified(rows=1)
    assert failed(found) == []
    assert any("case batch" in what and "--max-batch" in what for what in found.not_checked)
    assert "numbers of single" in found.checked


def test_no_case_within_the_profiles_is_an_error(
    engine_fp16: Path, artifact_fp16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = simulated(engine_fp16, artifact_fp16, monkeypatch, rows=2)
    for plan, (graph, profiles, on_host) in simulation.known.items():
        narrow = [
            {name: (least, least if name == "vision_index" else most) for name, (least, most) in p.items()}
            for p in profiles
        ]  # fmt: skip
        simulation.known[plan] = graph, narrow, on_host
    with pytest.raises(InputError, match="vision_index") as caught:
        verify_engine(engine_fp16)
    assert "--max-vision-tokens" in caught.value.hint


# --- beside ONNX Runtime ---


def test_beside_onnxruntime_every_step_is_compared(verified: Verify, artifact_fp16: Path) -> None:
    found = verified(artifact=artifact_fp16)
    assert failed(found) == []
    theirs = [g.name for g in found.gates if g.name.startswith("onnxruntime.")]
    assert theirs == [
        "onnxruntime.embed_tokens.differences", "onnxruntime.keep_sets.counts",
        "onnxruntime.keep_sets.cut.0", "onnxruntime.keep_sets.cut.1",
        "onnxruntime.logits.prefill.cosine", "onnxruntime.logits.decode.cosine",
        "onnxruntime.logits.top1",
    ]  # fmt: skip
    assert [g.name for g in found.gates[:2]] == ["vision_encoder.inputs", "decoder.inputs"]


def test_beside_onnxruntime_a_wrong_step_is_seen(verified: Verify, artifact_fp16: Path) -> None:
    found = verified("decode mask", artifact=artifact_fp16)
    assert "onnxruntime.logits.decode.cosine" in failed(found)
    assert "onnxruntime.logits.prefill.cosine" not in failed(found)


def test_another_artifact_is_refused(artifact_fp16: Path, tmp_path: Path, verified: Verify) -> None:
    other = Path(shutil.copytree(artifact_fp16, tmp_path / "other"))
    Manifest.load(other).model_copy(update={"peak_rss_bytes": 1}).save(other)
    with pytest.raises(EngineError, match="not built from this artifact"):
        verified(artifact=other)


# --- where it cannot run ---


@without_gpu
def test_without_a_gpu_the_files_are_checked_and_nobody_takes_that_for_more(
    engine_fp16: Path, artifact_fp16: Path
) -> None:
    done = vtr("verify", engine_fp16, "--onnxruntime", artifact_fp16, "--json")
    assert done.code == 3
    said = done.json
    assert (said["executed"], said["passed"]) == (False, None)
    assert [gate["name"] for gate in said["gates"]] == ["vision_encoder.inputs", "decoder.inputs"]
    (what,) = said["not_checked"]
    assert "logits" in what
    assert "driver" in what
    text = vtr("verify", engine_fp16)
    assert text.code == 3
    assert "NOT checked: logits" in text.out
    assert "all" not in text.out.splitlines()[-1]


def test_the_files_alone_can_be_asked_for(engine_fp16: Path) -> None:
    done = vtr("verify", engine_fp16, "--files", "--json")
    assert done.code == 0
    assert (done.json["executed"], done.json["passed"]) == (False, None)


def test_inputs_that_are_not_the_graphs_fail_a_gate(
    engine_fp16: Path, artifact_fp16: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(engine_fp16, tmp_path / "engine"))
    manifest = EngineManifest.load(copy)
    vision, decoder = manifest.engines
    profiles = tuple(
        profile.model_copy(
            update={"inputs": {n: b for n, b in profile.inputs.items() if n != "vision_index"}}
        )
        for profile in decoder.profiles
    )
    engines = vision, decoder.model_copy(update={"profiles": profiles})
    manifest.model_copy(update={"engines": engines}).save(copy)
    done = vtr("verify", copy, "--files", "--onnxruntime", artifact_fp16, "--json")
    assert done.code == 1
    (gate,) = [gate for gate in done.json["gates"] if not gate["passed"]]
    assert gate["name"] == "decoder.inputs"
    assert gate["detail"] == "vision_index"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "checkpoint"], "not with a checkpoint"),
        (["--scope", "layers:2"], "replayed whole"),
        (["--onnxruntime", "nowhere"], "not built from this artifact"),
    ],
)
def test_options_that_an_engine_has_no_use_for(
    options: list[str], said: str, engine_fp16: Path
) -> None:
    done = vtr("verify", engine_fp16, *options, "--json")
    assert done.code == 2
    assert said in done.json["error"]["message"]


def test_options_of_engines_are_refused_for_artifacts(artifact_fp16: Path) -> None:
    for options in (["--files"], ["--onnxruntime", "x"]):
        done = vtr("verify", artifact_fp16, *options)
        assert done.code == 2
        assert "goes with an engine" in done.err


def test_golden_vectors_that_are_gone_or_unreadable(engine_fp16: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(engine_fp16, tmp_path / "engine"))
    (copy / "golden" / "single.npz").write_bytes(b"PK")
    manifest = EngineManifest.load(engine_fp16)
    with pytest.raises(ArtifactError, match="damaged"):
        verify_engine(copy)
    manifest.model_copy(update={"files": hash_files(copy)}).save(copy)
    with pytest.raises(ArtifactError, match="cannot be read"):
        verify_engine(copy)
    shutil.rmtree(copy / "golden")
    manifest.model_copy(update={"files": hash_files(copy)}).save(copy)
    with pytest.raises(ArtifactError, match="no golden vectors"):
        verify_engine(copy)


def test_verifying_an_engine_needs_neither_torch_nor_onnxruntime(engine_fp16: Path) -> None:
    """Replayed on answers that numpy made up: they are wrong, and found to be."""
    blocked = ("torch", "transformers", "safetensors", "onnxscript", "onnxruntime")
    probe = f"""
import sys
for name in {blocked}: sys.modules[name] = None
import numpy as np
from pathlib import Path
from vtr_export.engine_manifest import EngineManifest
from vtr_export.runtime.session import Port
from vtr_export.verify import engine
folder = Path({str(engine_fp16)!r})

class Noise:
    def __init__(self, inputs, outputs): self.inputs, self.outputs = inputs, outputs
    def run(self, feeds, outputs=None, *, resident=()):
        batch, (past, new) = len(feeds["inputs_embeds"]), (8, feeds["inputs_embeds"].shape[1])
        made = {{"logits": np.ones((batch, 1, 64), np.float32)}}
        made |= {{n: np.tile(np.arange(min(new, 9)), (batch, 1)) for n in ("kept.0", "kept.1")}}
        return {{name: made.get(name, np.zeros((batch, 2, past, 16), np.float16)) for name in outputs}}

class Pixels(Noise):
    def run(self, feeds, outputs=None, *, resident=()):
        (pixels,) = feeds.values()
        return {{"features": np.ones((len(pixels), 16, 64), np.float16)}}

manifest, _, table = engine.read_engine(folder)
names = manifest.engine("decoder").profiles[0].inputs
outs = [n.replace("past_key_values", "present").replace("past_mask", "present_mask") for n in names if "past" in n]
ports = lambda names: {{n: Port(n, (None, 2, None, 16), "float16") for n in names}}
decoder = Noise(ports(names), ports([*outs, "logits", "kept.0", "kept.1"]))
engine.open_engine = lambda _: (manifest, (Pixels(ports(["pixel_values"]), {{}}), table, decoder))
found = engine.verify_engine(folder)
print(found.executed, found.failed > 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
def test_on_a_gpu_golden_vectors_are_what_the_engine_says(
    artifact_fp16: Path, tmp_path: Path
) -> None:
    from vtr_export.builder import build

    build(artifact_fp16, tmp_path / "engine", ranges={"max_batch": 2})
    found = verify_engine(tmp_path / "engine")
    assert found.executed
    assert failed(found) == []
