"""A whole export: what it publishes, what it refuses, and what a kill leaves behind.

A trace is most of an export's time: exports of this process share theirs (``shared_traces``).
"""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from command import vtr
from tiny_models import pictures, save_checkpoint, tiny_llava
from transformers import LlavaForConditionalGeneration

from vtr_export.checkpoint import Checkpoint
from vtr_export.errors import ArtifactError
from vtr_export.exporter import Report, export
from vtr_export.families import read_facts
from vtr_export.frontends import uniform
from vtr_export.manifest import Manifest
from vtr_export.schedule import Schedule
from vtr_export.verify.check import CASES

pytestmark = pytest.mark.usefixtures("shared_traces")
Exported = tuple[Path, Report]
HALF = Schedule.fastv(1, "50%")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint unlike the other: SigLIP tower, tied embedding, no tokenizer."""
    model = tiny_llava(layers=2, tower="siglip", tied=True)
    folder = save_checkpoint(model, tmp_path_factory.mktemp("model"))
    (folder / "tokenizer.json").unlink()
    return folder


def run_graph(folder: Path, name: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(folder / "onnx" / f"{name}.onnx")
    return session.run(None, feeds)


def decoder(folder: Path) -> onnx.GraphProto:
    file = folder / "onnx" / "decoder_model_merged.onnx"
    return onnx.load(file, load_external_data=False).graph


def test_it_publishes_what_its_report_and_its_manifest_say(exported: Exported) -> None:
    out, report = exported
    manifest = Manifest.load(out)
    manifest.check_hashes(out, full=True)
    on_disk = {
        p.relative_to(out).as_posix(): p.stat().st_size for p in out.rglob("*") if p.is_file()
    }
    assert report.files == on_disk
    assert manifest.schedule.keep_per_layer == (16, 8, 8)
    assert not report.verified
    assert any("not verified" in warning for warning in report.warnings)
    for name in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
        onnx.checker.check_model(out / "onnx" / f"{name}.onnx", full_check=True)


@pytest.mark.parametrize("verify", ["none", "all"])
def test_a_dry_run_names_the_files_that_an_export_writes(
    exported: Exported, checkpoint: Path, tmp_path: Path, verify: str
) -> None:
    _, report = exported
    dry = export(HALF, checkpoint, tmp_path / "dry", verify=verify, dry_run=True)
    golden = {f"golden/{name}.npz" for name in CASES} if verify == "all" else set()
    assert set(dry.files) == {*report.files, *golden}
    assert set(dry.files.values()) == {None}
    assert dry.vision_tokens_per_layer == report.vision_tokens_per_layer
    assert list(tmp_path.iterdir()) == []


def test_the_command_ends_with_one_json_object(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(f"model: {checkpoint}\n{HALF.dump()}")
    out = tmp_path / "out"
    done = vtr("export", "--schedule", tmp_path / "s.yaml", "--out", out, "--no-verify", "--json")
    assert done.code == 0
    assert done.out.count("\n") == 1
    assert done.json.keys() >= {"artifact", "verified", "seconds", "peak_rss_bytes", "files"}
    assert (done.json["artifact"], done.json["verified"]) == (str(out), False)
    assert done.json["seconds"] > 0
    assert done.json["peak_rss_bytes"] > 1 << 26
    assert all((out / name).stat().st_size == size for name, size in done.json["files"].items())
    assert "warning: not verified" in done.err


@pytest.mark.parametrize("which", ["checkpoint", "odd"])
def test_vision_encoder_and_embedding_say_what_transformers_says(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(which)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    export(HALF, folder, tmp_path / "out", verify="none")
    pixels = pictures(model, 3, torch.Generator().manual_seed(0))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
        embedded = model.get_input_embeddings()(ids)
    features = run_graph(tmp_path / "out", "vision_encoder", {"pixel_values": pixels.numpy()})[0]
    assert np.abs(features - expected.numpy()).max() < 1e-4
    found = run_graph(tmp_path / "out", "embed_tokens", {"input_ids": ids.numpy()})[0]
    assert (found == embedded.numpy()).all()


def test_stamped_layers_equal_traced_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava(layers=5)
    model.config.vision_config.num_hidden_layers = 5
    deep = type(model)(model.config)
    folder = save_checkpoint(deep.eval(), tmp_path / "model")
    export(HALF, folder, tmp_path / "stamped", verify="none")
    monkeypatch.undo()  # the second trace is another one
    monkeypatch.setattr(uniform, "is_uniform", lambda layers: False)
    export(HALF, folder, tmp_path / "traced", verify="none")
    pixels = pictures(deep, 2, torch.Generator().manual_seed(0)).numpy()
    stamped, traced = (tmp_path / name for name in ("stamped", "traced"))
    pair = [
        run_graph(out, "vision_encoder", {"pixel_values": pixels})[0] for out in (stamped, traced)
    ]
    assert (pair[0] == pair[1]).all()
    names = [
        sorted(t.name for t in decoder(out).initializer if "layers." in t.name)
        for out in (stamped, traced)
    ]
    assert names[0] == names[1]
    assert len(names[0]) == 5 * 9


def test_layers_that_differ_are_not_stamped() -> None:
    layers = list(tiny_llava(layers=4).model.language_model.layers)
    assert uniform.is_uniform(layers)
    layers[2].self_attn.scaling *= 2
    assert not uniform.is_uniform(layers)


def test_tied_weights_exist_once(odd: Path, tmp_path: Path) -> None:
    report = export(HALF, odd, tmp_path / "out", verify="none")
    data = sum(size or 0 for name, size in report.files.items() if name.endswith(".data"))
    stored = sum(ref.size_bytes for ref in Checkpoint.open(odd).tensors.values())
    assert data <= stored + 4096 * 60  # page alignment of each tensor
    head = next(
        t for t in decoder(tmp_path / "out").initializer if t.name.endswith("lm_head.weight")
    )
    places = {entry.key: entry.value for entry in head.external_data}
    assert places["location"] == "embed_tokens.onnx.data"


def test_a_checkpoint_without_a_tokenizer_exports_with_a_warning(odd: Path, tmp_path: Path) -> None:
    report = export(HALF, odd, tmp_path / "out", verify="none")
    assert any("tokenizer.json" in warning for warning in report.warnings)
    done = vtr("run", tmp_path / "out", "--no-image", "--prompt", "what colour")
    assert done.code == 2
    assert "tokenizer.json is missing" in done.err


def test_linked_artifacts_hold_no_weight_bytes(checkpoint: Path, tmp_path: Path) -> None:
    report = export(HALF, checkpoint, tmp_path / "out", weights="link", verify="none")
    assert not [name for name in report.files if name.endswith(".data")]
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.weights.folder == str(checkpoint)
    assert not manifest.weights_scanned


def test_fp16_takes_half_the_bytes(exported: Exported, checkpoint: Path, tmp_path: Path) -> None:
    _, full = exported
    half = export(HALF, checkpoint, tmp_path / "out", dtype="fp16", verify="none")
    graph = decoder(tmp_path / "out")
    kinds = {t.data_type for t in graph.initializer if t.name.endswith("proj.weight")}
    assert kinds == {onnx.TensorProto.FLOAT16}
    sizes = [report.files["onnx/decoder_model_merged.onnx.data"] for report in (half, full)]
    assert sizes[0] < sizes[1]
    logits = next(o for o in graph.output if o.name == "logits")
    assert logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_a_dump_shows_the_graph_after_each_pass(checkpoint: Path, tmp_path: Path) -> None:
    export(HALF, checkpoint, tmp_path / "out", verify="none", dump=tmp_path / "dump")
    texts = sorted(path.name for path in (tmp_path / "dump" / "decoder_model_merged").iterdir())
    assert any("InsertCuts" in name for name in texts)
    after = next((tmp_path / "dump" / "decoder_model_merged").glob("*InsertCuts*")).read_text()
    assert "VtrTopKPrune" in after


def unnamed(file: Path) -> bytes:
    """A file's content; a graph without its nodes' names, which count from where a copy begins."""
    if file.suffix != ".onnx":
        return file.read_bytes()
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        node.name = ""
    return bytes(model.SerializeToString(deterministic=True))


def test_another_trace_gives_the_same_files(
    exported: Exported, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the exports here that share one hide nothing."""
    out, report = exported
    monkeypatch.undo()
    fresh = export(HALF, checkpoint, tmp_path / "fresh", verify="none")
    assert fresh.files.keys() == report.files.keys()
    for name in {*fresh.files} - {"manifest.json"}:  # which holds timings
        assert unnamed(tmp_path / "fresh" / name) == unnamed(out / name), name


def test_an_existing_target_needs_force_and_a_foreign_folder_is_never_replaced(
    exported: Exported, checkpoint: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(exported[0], tmp_path / "out")
    with pytest.raises(ArtifactError, match="force"):
        export(HALF, checkpoint, out, verify="none")
    export(Schedule.vtw(2), checkpoint, out, verify="none", force=True)
    assert Manifest.load(out).schedule.keep_per_layer == (16, 16, 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ArtifactError):
        export(HALF, checkpoint, tmp_path / "mine", verify="none", force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "irreplaceable"


@pytest.mark.parametrize(
    ("marker", "start"),
    [("trace", "old"), ("copy weights", "nothing"), ("hash the files", "old")],
)
def test_a_killed_export_leaves_the_old_artifact_or_nothing(
    exported: Exported, marker: str, start: str, checkpoint: Path, tmp_path: Path
) -> None:
    """Killed as soon as the step is announced, in a process of its own that traces for itself."""
    out = tmp_path / "out"
    if start == "old":
        shutil.copytree(exported[0], out)
    program = (
        "import os, signal, sys\n"
        "from vtr_export.exporter import export\n"
        "from vtr_export.schedule import Schedule\n"
        "kill = lambda step: step == sys.argv[3] and os.kill(os.getpid(), signal.SIGKILL)\n"
        "export(Schedule.vtw(2), sys.argv[1], sys.argv[2], verify='none', force=True, progress=kill)"
    )
    command = [sys.executable, "-c", program, str(checkpoint), str(out), marker]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert out.exists() == (start == "old")
    if start == "old":
        manifest = Manifest.load(out)
        manifest.check_hashes(out, full=True)
        assert manifest.schedule.keep_per_layer == (16, 8, 8)
    assert [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name]
    export(Schedule.vtw(2), checkpoint, out, verify="none", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_facts_agree_with_the_traced_model(checkpoint: Path) -> None:
    config = Checkpoint.open(checkpoint).config
    facts = read_facts(config, "config.json")
    assert facts.tokens_per_image == 16
    assert facts.layers == 3
