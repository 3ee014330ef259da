"""A whole export: what it publishes, what it refuses, and what a kill leaves behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import pictures, save_checkpoint, tiny_llava

from vtr_export.checkpoint import Checkpoint
from vtr_export.errors import ArtifactError, CheckpointError, ScheduleError, VtrError, WeightError
from vtr_export.exporter import Report, export
from vtr_export.families import read_facts
from vtr_export.frontends import uniform
from vtr_export.manifest import Manifest
from vtr_export.schedule import Schedule

HALF = Schedule.fastv(1, "50%")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_llava(layers=3), tmp_path_factory.mktemp("model"), shards=2)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("out") / "artifact"
    return out, export(HALF, checkpoint, out, verify="none")


def run_graph(folder: Path, name: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(folder / "onnx" / f"{name}.onnx")
    return session.run(None, feeds)


def test_it_publishes_what_its_report_and_its_manifest_say(
    artifact: tuple[Path, Report], checkpoint: Path
) -> None:
    out, report = artifact
    manifest = Manifest.load(out)
    manifest.check_hashes(out, full=True)
    on_disk = {
        p.relative_to(out).as_posix(): p.stat().st_size for p in out.rglob("*") if p.is_file()
    }
    on_disk.pop("manifest.json")
    assert report.files == on_disk
    assert manifest.schedule.keep_per_layer == (16, 8, 8)
    assert not report.verified
    assert any("not verified" in warning for warning in report.warnings)
    for name in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
        onnx.checker.check_model(out / "onnx" / f"{name}.onnx", full_check=True)


def test_a_dry_run_names_the_files_that_an_export_writes(
    artifact: tuple[Path, Report], checkpoint: Path, tmp_path: Path
) -> None:
    _, report = artifact
    dry = export(HALF, checkpoint, tmp_path / "dry", verify="none", dry_run=True)
    assert set(dry.files) == {*report.files, "manifest.json"}
    assert dry.vision_tokens_per_layer == report.vision_tokens_per_layer
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_vision_encoder_and_embedding_say_what_transformers_says(
    tower: str, tmp_path: Path
) -> None:
    model = tiny_llava(layers=2, tower=tower)
    folder = save_checkpoint(model, tmp_path / "model")
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
    model = tiny_llava(layers=6)
    model.config.vision_config.num_hidden_layers = 6
    deep = type(model)(model.config)
    folder = save_checkpoint(deep.eval(), tmp_path / "model")
    export(HALF, folder, tmp_path / "stamped", verify="none")
    monkeypatch.setattr(uniform, "is_uniform", lambda layers: False)
    export(HALF, folder, tmp_path / "traced", verify="none")
    pixels = pictures(deep, 2, torch.Generator().manual_seed(0)).numpy()
    pair = [
        run_graph(tmp_path / n, "vision_encoder", {"pixel_values": pixels})[0]
        for n in ("stamped", "traced")
    ]
    assert (pair[0] == pair[1]).all()
    names = [
        sorted(
            t.name
            for t in onnx.load(
                tmp_path / n / "onnx" / "decoder_model_merged.onnx", load_external_data=False
            ).graph.initializer
            if "layers." in t.name
        )
        for n in ("stamped", "traced")
    ]
    assert names[0] == names[1]
    assert len(names[0]) == 6 * 9


def test_layers_that_differ_are_not_stamped() -> None:
    layers = list(tiny_llava(layers=4).model.language_model.layers)
    assert uniform.is_uniform(layers)
    layers[2].self_attn.scaling *= 2
    assert not uniform.is_uniform(layers)


def test_tied_weights_exist_once(tmp_path: Path) -> None:
    model = tiny_llava(layers=2, tied=True)
    folder = save_checkpoint(model, tmp_path / "model")
    report = export(HALF, folder, tmp_path / "out", verify="none")
    data = sum(size for name, size in report.files.items() if name.endswith(".data"))
    stored = sum(ref.size_bytes for ref in Checkpoint.open(folder).tensors.values())
    assert data <= stored + 4096 * 60  # page alignment of each tensor
    graph = onnx.load(
        tmp_path / "out" / "onnx" / "decoder_model_merged.onnx", load_external_data=False
    )
    head = next(t for t in graph.graph.initializer if t.name.endswith("lm_head.weight"))
    places = {entry.key: entry.value for entry in head.external_data}
    assert places["location"] == "embed_tokens.onnx.data"


def test_linked_artifacts_hold_no_weight_bytes(checkpoint: Path, tmp_path: Path) -> None:
    report = export(HALF, checkpoint, tmp_path / "out", weights="link", verify="none")
    assert not [name for name in report.files if name.endswith(".data")]
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.weights.folder == str(checkpoint)
    assert not manifest.weights_scanned


def test_fp16_takes_half_the_bytes(
    artifact: tuple[Path, Report], checkpoint: Path, tmp_path: Path
) -> None:
    _, full = artifact
    half = export(HALF, checkpoint, tmp_path / "out", dtype="fp16", verify="none")
    graph = onnx.load(
        tmp_path / "out" / "onnx" / "decoder_model_merged.onnx", load_external_data=False
    )
    kinds = {t.data_type for t in graph.graph.initializer if t.name.endswith("proj.weight")}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert (
        half.files["onnx/decoder_model_merged.onnx.data"]
        < full.files["onnx/decoder_model_merged.onnx.data"]
    )
    logits = next(o for o in graph.graph.output if o.name == "logits")
    assert logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_a_checkpoint_without_a_tokenizer_exports_with_a_warning(tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_llava(layers=2), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    report = export(HALF, folder, tmp_path / "out", verify="none")
    assert any("tokenizer.json" in warning for warning in report.warnings)


def test_a_dump_shows_the_graph_after_each_pass(checkpoint: Path, tmp_path: Path) -> None:
    export(HALF, checkpoint, tmp_path / "out", verify="none", dump=tmp_path / "dump")
    texts = sorted(path.name for path in (tmp_path / "dump" / "decoder_model_merged").iterdir())
    assert any("InsertCuts" in name for name in texts)
    after = next((tmp_path / "dump" / "decoder_model_merged").glob("*InsertCuts*")).read_text()
    assert "VtrTopKPrune" in after


# --- bad input ---------------------------------------------------------------------------------


def refused(kind: type[VtrError], out: Path, *args: object, **options: object) -> str:
    """The message of the refusal; nothing may be published, nothing left behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(kind) as caught:
        export(*args, out, verify="none", **options)  # type: ignore[arg-type]
    assert sorted(out.parent.iterdir()) == before
    assert caught.value.hint
    return str(caught.value)


def copy_of(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_nan_weight_is_named_and_nothing_is_published(tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_llava(layers=2), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    (tmp_path / "place").mkdir()
    assert name in refused(WeightError, tmp_path / "place" / "out", HALF, folder)


def test_unsupported_quantised_and_adapter_folders(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "out"
    other = copy_of(checkpoint, tmp_path / "other")
    edit_config(other, model_type="mamba")
    assert "llava" in refused(CheckpointError, out, HALF, other)
    quantised = copy_of(checkpoint, tmp_path / "quantised")
    edit_config(quantised, quantization_config={"quant_method": "awq"})
    assert "awq" in refused(CheckpointError, out, HALF, quantised)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "adapter" in refused(CheckpointError, out, HALF, adapter)
    assert refused(CheckpointError, out, HALF, tmp_path / "nowhere")


def test_missing_and_truncated_shards(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "out"
    broken = copy_of(checkpoint, tmp_path / "broken")
    shard = sorted(broken.glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    assert shard.name in refused(CheckpointError, out, HALF, broken)
    shard.unlink()
    assert shard.name in refused(CheckpointError, out, HALF, broken)


def test_weights_of_another_shape_than_the_config(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    folder = copy_of(checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, text_config=config["text_config"] | {"intermediate_size": 96})
    assert "shape" in refused(CheckpointError, tmp_path / "place" / "out", HALF, folder)


def test_a_schedule_that_does_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "out"
    assert refused(ScheduleError, out, Schedule.fastv(7, "50%"), checkpoint)
    assert refused(ScheduleError, out, Schedule.from_keeps([32, 8, 4]), checkpoint)
    assert "model" in refused(ScheduleError, out, HALF)


def test_an_existing_target_needs_force_and_a_foreign_folder_is_never_replaced(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(HALF, checkpoint, out, verify="none")
    with pytest.raises(ArtifactError, match="force"):
        export(HALF, checkpoint, out, verify="none")
    export(Schedule.vtw(2), checkpoint, out, verify="none", force=True)
    assert Manifest.load(out).schedule.keep_per_layer == (16, 16, 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ArtifactError):
        export(HALF, checkpoint, tmp_path / "mine", verify="none", force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "irreplaceable"


@pytest.mark.parametrize("marker", ["trace", "copy weights", "hash the files"])
def test_a_killed_export_leaves_the_old_artifact_or_nothing(
    marker: str, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    old = export(Schedule.vtw(2), checkpoint, out, verify="none")
    program = (
        "import sys; from vtr_export.exporter import export; from vtr_export.schedule import Schedule\n"
        "export(Schedule.fastv(1, '50%'), sys.argv[1], sys.argv[2], verify='none', force=True,"
        " progress=lambda step: print(step, flush=True))"
    )
    command = [sys.executable, "-c", program, str(checkpoint), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip() == marker:
                time.sleep(0.001)
                child.send_signal(signal.SIGKILL)
                break
    manifest = Manifest.load(out)
    manifest.check_hashes(out, full=True)
    assert manifest.schedule.keep_per_layer in (old.vision_tokens_per_layer, (16, 8, 8))
    export(HALF, checkpoint, out, verify="none", force=True)
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_facts_agree_with_the_traced_model(checkpoint: Path) -> None:
    config = Checkpoint.open(checkpoint).config
    facts = read_facts(config, "config.json")
    assert facts.tokens_per_image == 16
    assert facts.layers == 3
