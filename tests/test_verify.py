"""Parity is a gate: what passes it, the planted bugs it stops, and what happens then."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import verify_bugs
from command import vtr
from test_families import LLAVA_7B
from tiny_models import save_checkpoint, tiny_llava

from vtr_export import compile as compiler
from vtr_export.errors import ArtifactError
from vtr_export.exporter import Report, export
from vtr_export.families import read_facts
from vtr_export.manifest import Gate, Manifest
from vtr_export.published import hash_files
from vtr_export.schedule import Schedule
from vtr_export.verify.case import Case
from vtr_export.verify.check import CASES
from vtr_export.verify.compare import compare
from vtr_export.verify.gates import BARS
from vtr_export.verify.golden import MAX_BYTES, load_golden, write_golden
from vtr_export.verify.oracle import Oracle
from vtr_export.verify.pictures import draw_picture
from vtr_export.verify.questions import ask, question
from vtr_export.verify.scope import choose_scope
from vtr_export.verify.sessions import Parts

SCHEDULE = Schedule.from_keeps([16, 16, 9, 4])
LAYER_PARAMETERS = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096  # of LLAVA_7B's decoder


@dataclass(frozen=True)
class Exported:
    checkpoint: Path
    folder: Path
    report: Report


@pytest.fixture(scope="module")
def exported(one_trace: None, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A verified export; nobody changes it."""
    checkpoint = save_checkpoint(tiny_llava(layers=4), tmp_path_factory.mktemp("model"), shards=2)
    folder = tmp_path_factory.mktemp("out") / "artifact"
    return Exported(checkpoint, folder, export(SCHEDULE, checkpoint, folder, verify="all"))


@pytest.fixture(scope="module")
def cases(exported: Exported) -> list[Case]:
    return answers(exported.checkpoint, exported.folder, SCHEDULE, "fp32")


def answers(checkpoint: Path, folder: Path, schedule: Schedule, dtype: str) -> list[Case]:
    """What the reference says, its layers included."""
    facts = read_facts(json.loads((checkpoint / "config.json").read_text()), "")
    with TemporaryDirectory() as scratch:
        asked = ask(folder, checkpoint, facts, draw_picture(Path(scratch) / "picture.png"), None)
    oracle = Oracle(checkpoint, checkpoint, schedule.resolve(facts), dtype)
    return [
        oracle.answer(question(name, asked, rows, facts, pad=0), steps)
        for name, (rows, steps) in CASES.items()
    ]


@pytest.fixture
def copy(exported: Exported, tmp_path: Path) -> Path:
    """An artifact to damage."""
    return Path(shutil.copytree(exported.folder, tmp_path / "artifact"))


def first_failed(gates: list[Gate]) -> Gate:
    return next(gate for gate in gates if not gate.passed)


# --- what is checked ---


def test_every_gate_is_measured_and_passes(exported: Exported) -> None:
    gates = {gate.name: gate for gate in exported.report.gates}
    assert [name for name, gate in gates.items() if not gate.passed] == []
    for name in ("pixel_values", "token_ids", "embed_tokens.differences", "keep_sets.ties"):
        assert (gates[name].measured, gates[name].bar) == (0, 0)
    for name in ("vision_encoder", "forced.prefill", "forced.decode", "free.decode"):
        assert gates[f"{name}.cosine"].bar == 0.99999
    assert gates["forced.decode.difference"].bar == 1e-3
    for cut in (0, 1):
        assert gates[f"keep_sets.cut.{cut}"].measured == 1
        assert "least margin" in gates[f"keep_sets.cut.{cut}"].detail


def test_the_reference_is_asked_for_sixteen_steps_and_for_rows_of_unlike_length(
    cases: list[Case],
) -> None:
    assert cases[0].tokens.shape == (1, 16)
    batch = cases[1].question
    assert set(batch.attention_mask.sum(1)) == {
        batch.attention_mask.shape[1],
        batch.attention_mask[0].sum(),
    }
    assert batch.attention_mask.min() == 0


def asked_of(folder: Path, checkpoint: Path) -> dict[str, Gate]:
    """The gates of what is prepared from the files of an artifact."""
    facts = read_facts(json.loads((checkpoint / "config.json").read_text()), "")
    with TemporaryDirectory() as scratch:
        picture = draw_picture(Path(scratch) / "picture.png")
        return {gate.name: gate for gate in ask(folder, checkpoint, facts, picture, None).gates}


def test_an_artifact_that_prepares_images_or_prompts_otherwise_fails(
    copy: Path, exported: Exported
) -> None:
    edit(copy / "processor_config.json", "image_processor", "resample", 2)
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant :", "assistant : ?"))
    gates = asked_of(copy, exported.checkpoint)
    assert not gates["pixel_values"].passed
    assert "pictures" in gates["pixel_values"].detail
    assert not gates["token_ids"].passed


def edit(file: Path, part: str, name: str, value: object) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data[part][name] != value
    data[part][name] = value
    file.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize("name", verify_bugs.PLANTED)
def test_a_planted_bug_fails_a_gate_that_says_where(
    name: str, copy: Path, cases: list[Case]
) -> None:
    graph, bug, gate, words = verify_bugs.PLANTED[name]
    failed = first_failed(compare(plant(bug, copy, graph), cases, BARS["fp32"]))
    assert failed.name == gate, failed
    assert [part for part in words if part not in failed.detail] == [], failed.detail


def plant(bug: verify_bugs.Bug, folder: Path, graph: str = verify_bugs.DECODER) -> Parts:
    """The parts of an artifact, one of them spoilt."""
    parts = Parts.of(folder, Manifest.load(folder))
    file = folder / "onnx" / f"{graph}.onnx"
    model = ir.load(file)
    bug(model)
    ir.save(model, file)
    return parts


@pytest.mark.parametrize(
    "options",
    [
        {"drop_point": "inside", "positions": "repacked"},
        {"score": {"from": "next", "query": "text"}, "rank": "per_image"},
    ],
    ids=str,
)
def test_the_layer_is_named_wherever_the_cut_is(
    options: dict[str, Any], exported: Exported, tmp_path: Path
) -> None:
    schedule = Schedule.from_keeps([16, 16, 9, 4], **options)
    export(schedule, exported.checkpoint, tmp_path / "out", verify="none")
    cases = answers(exported.checkpoint, tmp_path / "out", schedule, "fp32")
    for layer in (1, 2):
        bug = verify_bugs.scaled(f"layers.{layer}.mlp.up_proj.weight", 1.01)
        copied = Path(shutil.copytree(tmp_path / "out", tmp_path / f"spoilt_{layer}"))
        failed = first_failed(compare(plant(bug, copied), cases, BARS["fp32"]))
        assert f"layer {layer} deviates first" in failed.detail


def test_an_overflow_that_this_runtime_would_hide_is_seen(
    exported: Exported, tmp_path: Path
) -> None:
    """An fp16 graph is compared as its fp32 twin, which rounds where the graph would."""
    out = tmp_path / "out"
    export(SCHEDULE, exported.checkpoint, out, verify="none", dtype="fp16")
    cases = answers(exported.checkpoint, out, SCHEDULE, "fp16")
    assert all(gate.passed for gate in compare(plant(lambda _: None, out), cases, BARS["fp16"]))
    bug = verify_bugs.leaves_the_range_of_fp16(1)
    failed = first_failed(compare(plant(bug, out), cases, BARS["fp16"]))
    assert failed.name == "forced.prefill.cosine"
    assert "layer 1 is the first to give infinity or NaN" in failed.detail


# --- what an export does with it ---


def test_a_failed_gate_exits_1_names_the_layer_and_publishes_nothing(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_lowering(monkeypatch, verify_bugs.rotates_the_other_way(1))
    place = tmp_path / "place"
    place.mkdir()
    done = vtr(*arguments(exported, tmp_path), "--out", place / "artifact", "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "VTR401"
    assert "layer 1 deviates first" in done.err
    assert "forced.prefill.cosine" in done.err
    assert list(place.iterdir()) == []


def spoil_lowering(monkeypatch: pytest.MonkeyPatch, bug: verify_bugs.Bug) -> None:
    """The compiler, with a bug in its decoders."""
    lower: Callable[..., dict[str, ir.Model]] = compiler.lower

    def spoiled(*given: object, **options: object) -> dict[str, ir.Model]:
        models = lower(*given, **options)
        bug(models[verify_bugs.DECODER])
        return models

    monkeypatch.setattr(compiler, "lower", spoiled)


def arguments(exported: Exported, folder: Path) -> list[object]:
    file = folder / "schedule.yaml"
    file.write_text(SCHEDULE.dump(), encoding="utf-8")
    return ["export", "--schedule", file, "--model", exported.checkpoint]


def test_no_verify_warns_and_says_so(exported: Exported, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = vtr(*arguments(exported, tmp_path), "--out", out, "--no-verify", "--json")
    assert done.code == 0
    assert "warning: not verified" in done.err
    assert done.json["verified"] is False
    manifest = Manifest.load(out)
    assert (manifest.verified, manifest.scope, manifest.gates) == (False, "none", ())
    refused = vtr("verify", out)
    assert refused.code == 2
    assert "no golden vectors" in refused.err


def test_the_first_layers_are_verified_and_the_manifest_says_which(
    exported: Exported, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = export(SCHEDULE, exported.checkpoint, out, verify="layers:3")
    manifest = Manifest.load(out)
    assert (manifest.verified, manifest.scope, report.scope) == (True, "layers:3", "layers:3")
    cuts = [gate.detail for gate in report.gates if gate.name.startswith("keep_sets.cut.")]
    assert len(cuts) == 1
    assert cuts[0].startswith("before layer 2")
    assert not any(name.startswith("golden/") for name in manifest.files)


@pytest.mark.parametrize("scope", ["layers:0", "layers:", "layers:-1", "most", "layers:2x"])
def test_a_scope_that_is_none_is_refused_before_anything_is_done(
    scope: str, exported: Exported, tmp_path: Path
) -> None:
    done = vtr(*arguments(exported, tmp_path), "--out", tmp_path / "out", "--verify", scope)
    assert done.code == 2
    assert "layers:K" in done.err
    assert not (tmp_path / "out").exists()


def test_the_verification_reports_its_own_time_and_memory(exported: Exported) -> None:
    said = exported.report.to_json()
    assert set(said["verification"]) == {"seconds", "peak_rss_bytes"}
    assert 0 < said["verification"]["seconds"] < said["seconds"]
    assert 100e6 < said["verification"]["peak_rss_bytes"] != said["peak_rss_bytes"]


# --- scope by memory ---


def test_a_model_is_verified_whole_when_two_copies_fit() -> None:
    facts = read_facts(LLAVA_7B, "")
    assert choose_scope(facts, 100 << 30) == "all"
    assert choose_scope(facts, 56 << 30) != "all"
    assert choose_scope(facts, 60 << 30, dtype="fp16") == "all"


@pytest.mark.parametrize("gib", [12, 20, 33, 48])
def test_as_many_layers_are_verified_as_fit(gib: int) -> None:
    available = gib << 30
    count = int(choose_scope(read_facts(LLAVA_7B, ""), available).removeprefix("layers:"))
    rest = 8 * (2 * 32064 * 4096 + 0.33e9)  # embedding and head; tower and projector
    assert rest + 8 * LAYER_PARAMETERS * count < 0.81 * available
    assert rest + 8 * LAYER_PARAMETERS * (count + 1) > 0.79 * available


def test_one_layer_is_always_verified() -> None:
    assert choose_scope(read_facts(LLAVA_7B, ""), 0) == "layers:1"


# --- golden vectors ---


def test_golden_vectors_are_small_and_hashed_in_the_manifest(exported: Exported) -> None:
    files = sorted((exported.folder / "golden").iterdir())
    assert [file.name for file in files] == ["batch.npz", "single.npz"]
    assert sum(file.stat().st_size for file in files) < 8e6
    listed = json.loads((exported.folder / "manifest.json").read_text())["files"]
    for file in files:
        assert (
            listed[f"golden/{file.name}"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        )


def test_golden_vectors_too_large_are_not_written(cases: list[Case], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random((1, 3, 1000, 1000), np.float32)
    large = replace(cases[1], question=replace(cases[1].question, images={"pixel_values": noise}))
    assert write_golden([cases[0], large], tmp_path / "golden") == ("single.npz",)
    assert sum(f.stat().st_size for f in (tmp_path / "golden").iterdir()) <= MAX_BYTES


def test_an_artifact_is_verified_where_torch_cannot_be_imported(exported: Exported) -> None:
    program = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'safetensors', 'onnxscript'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from vtr_export.cli import main\n"
        "sys.argv = ['vtr', 'verify', sys.argv[1], '--json']\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, str(exported.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["passed"] is True
    names = {gate["name"] for gate in said["gates"]}
    assert {
        "vision_encoder.cosine",
        "forced.decode.cosine",
        "keep_sets.cut.1",
        "free.decode.cosine",
    } <= names


def test_verify_for_people(exported: Exported) -> None:
    done = vtr("verify", exported.folder)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].split() == ["gate", "measured", "required"]
    assert lines[1].startswith("ok")
    assert lines[-1] == f"all {len(lines) - 2} gates pass"


@pytest.mark.parametrize("name", ["golden/single.npz", "onnx/decoder_model_merged.onnx.data"])
@pytest.mark.parametrize("how", ["a bit flips", "cut off", "gone"])
def test_a_damaged_artifact_is_refused(name: str, how: str, copy: Path) -> None:
    file = copy / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if how == "a bit flips" else content[:-9])
    if how == "gone":
        file.unlink()
    done = vtr("verify", copy)
    assert done.code == 2
    assert name in done.err


def test_golden_vectors_are_what_the_verdict_depends_on(copy: Path) -> None:
    file = copy / "golden" / "single.npz"
    with np.load(file) as stored:
        arrays = dict(stored)
    arrays["logits"][0, 3] += np.linspace(0, 0.01, arrays["logits"].shape[-1])
    np.savez_compressed(file, **arrays)
    rewrite_hashes(copy)
    done = vtr("verify", copy, "--json")
    assert done.code == 1
    failed = [gate["name"] for gate in done.json["gates"] if not gate["passed"]]
    assert "forced.decode.difference" in failed
    assert "forced.prefill.difference" not in failed


def rewrite_hashes(folder: Path) -> None:
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    manifest = Manifest.model_validate_json(text)
    manifest.model_copy(update={"files": hash_files(folder)}).save(folder)


def test_files_that_are_no_golden_vectors_are_refused(exported: Exported, tmp_path: Path) -> None:
    whole = (exported.folder / "golden" / "single.npz").read_bytes()
    pickled = io.BytesIO()
    np.savez(pickled, tokens=np.array([{}], dtype=object))
    broken = bytearray(whole)
    broken[200] ^= 0xFF
    for content in (b"", b"PK", whole[:-30], bytes(broken), pickled.getvalue()):
        file = tmp_path / "single.npz"
        file.write_bytes(content)
        with pytest.raises(ArtifactError, match="cannot be read"):
            load_golden(file)


def test_beside_its_checkpoint_an_artifact_of_another_one_fails(
    exported: Exported, tmp_path: Path
) -> None:
    other = save_checkpoint(tiny_llava(layers=4, seed=1), tmp_path / "other")
    done = vtr("verify", exported.folder, "--model", other, "--json")
    assert done.code == 1
    assert (
        first_failed([Gate(**gate) for gate in done.json["gates"]]).name == "vision_encoder.cosine"
    )
