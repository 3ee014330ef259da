"""vtr build: real engines, without a GPU, old or new and never in between."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command import vtr
from safetensors.numpy import load_file

from vtr_export import builder
from vtr_export.backends.tensorrt import build as parent
from vtr_export.backends.tensorrt import child, library, plugin
from vtr_export.backends.tensorrt.build import build_plan
from vtr_export.backends.tensorrt.child import Job
from vtr_export.builder import build
from vtr_export.compile import engine, run
from vtr_export.engine_manifest import EngineManifest
from vtr_export.errors import EngineError
from vtr_export.exporter import export
from vtr_export.manifest import Manifest
from vtr_export.passes.allow_unfused import count_unfused
from vtr_export.published import MANIFEST, hash_files
from vtr_export.schedule import Schedule

pytestmark = pytest.mark.skipif(
    not library.is_installed("tensorrt-rtx"),
    reason="TensorRT-RTX is not installed: pip install 'vtr-export[rtx]' (x86-64 Linux)",
)
PROMISED = {
    "component", "file", "bytes", "seconds", "peak_rss_bytes", "profiles", "plugin_layers",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_compiled_plugin(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this machine's user compiled plays no part."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("VTR_PLUGIN_PATH", raising=False)


@pytest.fixture
def artifact(artifact_fp16: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(artifact_fp16, tmp_path / "artifact"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def resigned(folder: Path) -> None:
    """The manifest vouches for the files as they are now."""
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    files = {name: now for name, now in hash_files(folder).items() if name in manifest.files}
    manifest.model_copy(update={"files": files}).save(folder)


def refused(*arguments: object, words: tuple[str, ...], code: str) -> None:
    done = vtr("build", *arguments)
    assert done.code == 2, done.err
    assert f"error[{code}]" in done.err
    assert "help: " in done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err, done.err


# --- what is built ---


def test_an_engine_folder_holds_all_that_running_needs(
    engine_fp16: Path, artifact_fp16: Path
) -> None:
    made = EngineManifest.load(engine_fp16)
    made.check_hashes(engine_fp16, full=True)
    assert sorted(contents(engine_fp16)) == sorted([*made.files, MANIFEST])
    assert (made.versions.target, made.sms, made.plugin) == ("tensorrt-rtx", (86,), None)
    assert made.artifact == Manifest.load(artifact_fp16)
    assert [profile.name for profile in made.engine("decoder").profiles] == [
        "context",
        "generation",
    ]
    assets = {"tokenizer.json", "schedule.yaml", "golden/single.npz", "golden/batch.npz"}
    assert assets <= made.files.keys()
    table = np.load(engine_fp16 / made.embeddings, mmap_mode="r")
    graph = onnx.load(artifact_fp16 / "onnx" / "embed_tokens.onnx")
    (weight,) = graph.graph.initializer
    np.testing.assert_array_equal(table, onnx.numpy_helper.to_array(weight))


def test_json_is_what_scripts_were_promised(artifact: Path) -> None:
    done = vtr("build", artifact, "--target", "tensorrt-rtx", "--sm", "86,8.9,sm_120", "--json")
    assert done.code == 0, done.err
    assert (done.json["sms"], done.json["engine"]) == (
        [86, 89, 120],
        str(artifact / "tensorrt-rtx"),
    )
    assert [each["component"] for each in done.json["engines"]] == ["vision_encoder", "decoder"]
    for each in done.json["engines"]:
        assert each.keys() >= PROMISED
        assert Path(each["file"]).stat().st_size == each["bytes"] > 0
        assert each["seconds"] > 0
        assert each["peak_rss_bytes"] > each["bytes"]
        assert each["plugin_layers"] == 0


def test_building_needs_neither_torch_nor_transformers_nor_onnxruntime(artifact: Path) -> None:
    """All three are hidden: the engine is built, and what could not be checked is said."""
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'onnxruntime'): sys.modules[name] = None\n"
        "from vtr_export.builder import build\nprint(build(sys.argv[1], sms=(86,)).warnings)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, artifact], capture_output=True, text=True, check=True
    )
    assert "not replayed before building: onnxruntime is not installed" in done.stdout


def test_a_lowering_that_changes_answers_builds_nothing(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(opened: Any = ()) -> Any:
        return (*engine(opened), Halve())

    monkeypatch.setattr(builder, "lowering", wrong)
    done = vtr("build", artifact, "--sm", "86")
    assert done.code == 1, done.err
    assert "VTR401" in done.err
    assert "first forced.prefill" in done.err
    assert not (artifact / "tensorrt-rtx").exists()


class Halve(ir.passes.InPlacePass):
    """A bug: queries are scaled twice."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in model.graph:
            if node.op_type == "Attention" and "past_key_values.0.key" in {
                i.name for i in model.graph.inputs
            }:
                node.attributes["scale"] = ir.AttrFloat32("scale", 0.5)
        return ir.passes.PassResult(model, modified=True)


def network_weights(graph: Path, weights: dict[str, Path]) -> dict[str, np.ndarray[Any, Any]]:
    """The matrices TensorRT holds after parsing ``graph``, by name."""
    found = library.load("tensorrt-rtx")
    trt, log = found.trt, child._log(found, lambda message: None)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    job = Job("tensorrt-rtx", graph, weights, graph, [], (86,))
    matrices = {}
    with ExitStack() as mapped:
        child._parse(parser, network, job, mapped, log)
        for layer in (network.get_layer(number) for number in range(network.num_layers)):
            if layer.type == trt.LayerType.CONSTANT and len(layer.get_output(0).shape) == 2:
                layer.__class__ = trt.IConstantLayer
                matrices[layer.name] = np.array(layer.weights)
    return matrices


def test_tensorrt_is_given_the_artifacts_weights(artifact_fp16: Path) -> None:
    graph = artifact_fp16 / "onnx" / "decoder_model_merged.onnx"
    given = network_weights(graph, {f"{graph.name}.data": graph.with_name(f"{graph.name}.data")})
    stored = [each for each in onnx.load(graph).graph.initializer if len(each.dims) == 2]
    assert len(stored) == 3 * 7 + 1
    for weight in stored:
        expected = onnx.numpy_helper.to_array(weight).ravel()
        (found,) = (value for name, value in given.items() if weight.name in name)
        np.testing.assert_array_equal(found.ravel(), expected)


def test_linked_weights_are_read_where_they_lie(
    checkpoint_fp16: Path, artifact_fp16: Path, shared_traces: None, tmp_path: Path
) -> None:
    out = tmp_path / "linked"
    schedule = tmp_path / "s.yaml"
    schedule.write_text((artifact_fp16 / "schedule.yaml").read_text())
    done = vtr("export", "-s", schedule, "-m", checkpoint_fp16, "-o", out, "--dtype", "fp16", "--weights",
               "link", "--no-verify", "--target", "tensorrt-rtx", "--sm", "86", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert len(done.json["build"]["engines"]) == 2
    made = EngineManifest.load(out / "tensorrt-rtx")
    shards = Manifest.load(out).linked_shards()
    given = network_weights(out / "onnx" / "decoder_model_merged.onnx", shards)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        expected = hub_weight(shards, f"language_model.{name}.weight")
        (found,) = (
            value for key, value in given.items() if f"{name.partition('.')[2]}.weight" in key
        )
        np.testing.assert_array_equal(found.ravel(), expected.ravel())
    np.testing.assert_array_equal(
        np.load(out / "tensorrt-rtx" / made.embeddings),
        np.load(_table_of_copy(artifact_fp16, tmp_path)),
    )


def hub_weight(shards: dict[str, Path], name: str) -> np.ndarray[Any, Any]:
    (found,) = (load_file(file)[name] for file in shards.values() if name in load_file(file))
    return found


def _table_of_copy(artifact: Path, folder: Path) -> Path:
    from vtr_export.embeddings import write_table

    write_table(artifact / "onnx" / "embed_tokens.onnx", folder / "table.npy", "fp16", {})
    return folder / "table.npy"


def test_a_cut_that_can_drop_nothing_is_left_out(artifact: Path) -> None:
    done = build(artifact, sms=(86,), ranges={"max_vision_tokens": 0})
    whole = build(artifact, artifact / "whole", sms=(86,))
    assert (done.opened_cuts, whole.opened_cuts) == ((0, 1), ())
    layers = [report.engines[1]["layers"] for report in (done, whole)]
    assert layers[0] < layers[1]
    ports = [EngineManifest.load(f).engine("decoder").profiles[0].inputs.keys()
             for f in (artifact / "tensorrt-rtx", artifact / "whole")]  # fmt: skip
    assert ports[0] == ports[1]


def test_both_profiles_share_one_copy_of_the_weights(
    engine_fp16: Path, artifact_fp16: Path
) -> None:
    decoder = EngineManifest.load(engine_fp16).engine("decoder")
    stored = (artifact_fp16 / "onnx" / "decoder_model_merged.onnx.data").stat().st_size
    assert decoder.weights_bytes is not None
    assert 0.9 * stored < decoder.weights_bytes < 1.3 * stored


ATTENTION = """<ir_version: 10, opset_import: ["": 24]>
g (float16[B,2,S,WIDTH] q, float16[B,2,T,WIDTH] k) => (float16[B,2,S,WIDTH] y) { y = Attention (q, k, k) }"""


@pytest.mark.parametrize(("width", "unfused"), [(8, 1), (16, 0), (72, 0), (256, 0), (264, 1)])
def test_attention_that_no_fused_kernel_takes_is_built_unfused_and_counted(
    width: int, unfused: int, tmp_path: Path
) -> None:
    shapes = dict.fromkeys("qk", ((1, 2, 1, width), (1, 2, 8, width), (2, 2, 16, width)))
    text = ATTENTION.replace("WIDTH", str(width))

    def built(model: ir.Model) -> dict[str, Any]:
        graph = tmp_path / "graph.onnx"
        graph.write_bytes(ir.to_proto(model).SerializeToString())
        job = Job("tensorrt-rtx", graph, {}, tmp_path / "attention.plan", [shapes], (86,))
        return build_plan(job)

    lowered = run(engine(), ir.from_onnx_text(text))
    assert count_unfused(lowered) == unfused
    assert built(lowered)["bytes"] > 0
    if unfused:
        with pytest.raises(EngineError, match="dedicated kernel"):
            built(ir.from_onnx_text(text))


def test_one_engine_of_a_tunable_artifact_serves_many_budgets(
    checkpoint_fp16: Path, shared_traces: None, tmp_path: Path
) -> None:
    schedule = Schedule.parse("version: 1\nprefill: {keep: [16, 8, 3]}\n")
    out = tmp_path / "tunable"
    export(schedule, checkpoint_fp16, out, dtype="fp16", verify="none", tunable=True)
    assert build(out, sms=(86,), unverified=True, plugin="off").opened_cuts == ()
    for profile in EngineManifest.load(out / "tensorrt-rtx").engine("decoder").profiles:
        keep = profile.inputs["keep"]
        assert (keep.least, keep.best, keep.most) == ((0, 0), (8, 3), (16, 16))


# --- again ---


def test_an_unchanged_artifact_is_up_to_date(artifact: Path) -> None:
    first = build(artifact, sms=(86,))
    assert not first.up_to_date
    before = contents(artifact / "tensorrt-rtx")
    again = build(artifact, sms=(86,))
    assert again.up_to_date
    assert again.engines == first.engines
    assert contents(artifact / "tensorrt-rtx") == before
    assert not build(artifact, sms=(86,), ranges={"max_batch": 2}).up_to_date
    assert not build(artifact, sms=(89,), ranges={"max_batch": 2}).up_to_date


def test_a_plugin_found_later_is_built_in(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(artifact, sms=(86,)).plugin is None
    monkeypatch.setattr(plugin, "find", lambda *_, **__: plugin.in_python())
    done = build(artifact, sms=(86,))
    assert not done.up_to_date
    assert [each["plugin_layers"] for each in done.engines] == [0, 2]
    assert build(artifact, sms=(86,)).up_to_date
    made = EngineManifest.load(artifact / "tensorrt-rtx")
    assert made.plugin is not None
    with pytest.raises(EngineError) as caught:
        made.check_plugin("1", "0" * 64)
    assert all(word in str(caught.value) for word in ("VtrTopKPrune", "vtr build-plugin"))


def test_a_changed_artifact_or_a_damaged_engine_is_built_again(artifact: Path) -> None:
    build(artifact, sms=(86,))
    plan = artifact / "tensorrt-rtx" / "decoder.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert not build(artifact, sms=(86,)).up_to_date
    manifest = Manifest.load(artifact)
    manifest.model_copy(update={"peak_rss_bytes": 1}).save(artifact)
    assert not build(artifact, sms=(86,)).up_to_date
    assert build(artifact, sms=(86,)).up_to_date


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--sm", "85"], "VTR202", ("no SM '85'", "--sm")),
        (["--sm", "87"], "VTR202", ("Jetson Orin", "--target tensorrt on the device")),
        (["--sm", "90"], "VTR202", ("Hopper",)),
        ([], "VTR301", ("no GPU", "--sm 86,89,120")),
        (["--target", "onnxruntime"], "VTR202", ("onnxruntime",)),
        (["--target", "tensorrt"], "VTR301", ("'tensorrt', which is not installed", "pip install")),
        (["--sm", "86", "--plugin", "maybe"], "VTR202", ("maybe", "auto, on, off")),
        (["--sm", "86", "--max-text-tokens", "9999"], "VTR202", ("context",)),
        (["--sm", "86", "--opt-batch", "2"], "VTR202", ("--opt-batch 2", "--max-batch 1")),
    ],
)
def test_what_cannot_be_built_is_refused_early(
    arguments: list[str], code: str, words: tuple[str, ...], artifact_fp16: Path, tmp_path: Path
) -> None:
    refused(artifact_fp16, "-o", tmp_path / "out", *arguments, code=code, words=words)
    assert not list(tmp_path.iterdir())


def test_a_missing_wheel_is_named(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.MODULES, "tensorrt-rtx", ("tensorrt_of_nobody",))
    refused(artifact, "--sm", "86", code="VTR301", words=("pip install 'vtr-export[rtx]'",))


def test_what_is_no_buildable_artifact_is_refused(
    artifact: Path, engine_fp16: Path, exported: tuple[Path, Any], tmp_path: Path
) -> None:
    refused(exported[0], "--sm", "86", code="VTR203", words=("unverified", "--unverified"))
    refused(
        exported[0], "--sm", "86", "--unverified", code="VTR202", words=("fp32", "--dtype fp16")
    )
    refused(engine_fp16, "--sm", "86", code="VTR201", words=("holds an engine, not an artifact",))
    refused(tmp_path / "none", "--sm", "86", code="VTR201", words=("no such artifact",))
    refused(artifact, "-o", artifact, "--sm", "86", code="VTR203", words=("not replaced", "--out"))
    text = json.loads((artifact / MANIFEST).read_text())
    (artifact / MANIFEST).write_text(json.dumps(text | {"format": 2}))
    refused(artifact, "--sm", "86", code="VTR201", words=("newer vtr-export", "pip install -U"))


def test_a_corrupted_graph_is_found_and_the_old_engine_stays(artifact: Path) -> None:
    build(artifact, sms=(86,))
    before = contents(artifact / "tensorrt-rtx")
    graph = artifact / "onnx" / "decoder_model_merged.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(artifact, "--sm", "89", code="VTR201", words=("damaged", "decoder_model_merged.onnx"))
    model = onnx.load_from_string(whole)
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    node.op_type = "Compress"  # ONNX has it, TensorRT does not
    graph.write_bytes(model.SerializeToString())
    resigned(artifact)
    refused(artifact, "--sm", "89", code="VTR101", words=("replay the lowered graphs",))
    shutil.rmtree(artifact / "golden")  # nothing to replay: the parser is the first to look
    resigned(artifact)
    refused(artifact, "--sm", "89", code="VTR203", words=("does not take the graph", node.name))
    assert contents(artifact / "tensorrt-rtx") == before


def test_a_full_disk_harms_nothing(artifact_fp16: Path, small_disk: Path) -> None:
    refused(
        artifact_fp16, "-o", small_disk / "engine", "--sm", "86", code="VTR201", words=("full",)
    )
    assert not list(small_disk.iterdir())


def test_killed_midway_the_old_engine_stays_and_the_next_build_cleans_up(artifact: Path) -> None:
    build(artifact, sms=(86,))
    before = contents(artifact / "tensorrt-rtx")
    command = [sys.executable, "-c", "from vtr_export.cli import main; main()",
               "build", artifact, "--sm", "86,89,120"]  # fmt: skip
    for step in ("build the vision encoder", "build the decoder"):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
            assert running.stderr is not None
            assert any(step in line for line in running.stderr)
            time.sleep(0.5)
            children = _builders(running.pid)
            running.send_signal(signal.SIGKILL)
            running.wait()
        assert contents(artifact / "tensorrt-rtx") == before
        assert children
        assert all(_ends(child) for child in children)
    assert list(artifact.glob("tensorrt-rtx.tmp-*"))
    assert not build(artifact, sms=(86, 89)).up_to_date
    assert not list(artifact.glob("tensorrt-rtx.tmp-*"))


def _builders(pid: int) -> list[int]:
    """The process's children that build; a test before this one may have left others."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"tensorrt.child" in _command(child)]


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


def _ends(pid: int) -> bool:
    """Whether the process is gone, or a corpse, within ten seconds."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX":
            return True
        time.sleep(0.1)
    return False


def test_a_builder_that_dies_is_an_error_that_names_the_last_layer(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder's process is shot while it works: nothing of it may be a traceback."""

    def shoot(messages: Any, announce: Any) -> str:
        for line in messages:
            if "layer" in json.loads(line):
                (child,) = _builders(os.getpid())
                os.kill(child, signal.SIGSEGV)
                return str(json.loads(line)["layer"]) + watch(messages, announce)[:0]
        raise AssertionError("it names no layer")

    watch = parent._watch
    monkeypatch.setattr(parent, "_watch", shoot)
    words = ("crashed (signal SIGSEGV)", "vision_encoder, layer node", "the old engine")
    refused(artifact, "--sm", "86", code="VTR203", words=words)
    assert not (artifact / "tensorrt-rtx").exists()
