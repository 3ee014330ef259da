"""What leaves the range of its dtype is named: 20 planted, none where there is none."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import verify_bugs
from test_verify import answers
from tiny_models import save_checkpoint, tiny_llava

from vtr_export.errors import ArtifactError
from vtr_export.exporter import export
from vtr_export.manifest import Manifest
from vtr_export.published import hash_files
from vtr_export.schedule import Schedule
from vtr_export.verify import check_range
from vtr_export.verify.case import Case
from vtr_export.verify.compare import compare
from vtr_export.verify.gates import BARS
from vtr_export.verify.golden import write_golden
from vtr_export.verify.overflow import (
    Range,
    beyond_in_decoder,
    beyond_in_embeddings,
    beyond_in_features,
    first_beyond,
)
from vtr_export.verify.play import embed, encode
from vtr_export.verify.sessions import Parts

DECODER, VISION, TABLE = verify_bugs.DECODER, "vision_encoder", "embed_tokens"
SCHEDULE = Schedule.from_keeps([16, 9, 4])
LARGEST = {"fp16": 65504.0, "bf16": 3.3895314e38}


@dataclass(frozen=True)
class Exports:
    """One tiny model in each typed dtype, and what its golden vectors would be."""

    folders: dict[str, Path]
    cases: list[Case]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    home = tmp_path_factory.mktemp("overflow")
    checkpoint = save_checkpoint(tiny_llava(layers=3), home / "model")
    folders = {dtype: home / dtype for dtype in LARGEST}
    export(SCHEDULE, checkpoint, folders["fp16"], dtype="fp16", verify="none")
    shutil.copytree(folders["fp16"], folders["bf16"])
    for graph in (DECODER, VISION, TABLE):
        spoil(folders["bf16"], graph, half_to_bfloat)
    batch = answers(checkpoint, folders["fp16"], SCHEDULE, "fp16")[1]
    short = replace(batch, tokens=batch.tokens[:, :1], logits=batch.logits[:, :2], trace=None)
    return Exports(folders, [replace(short, logit_ids=batch.logit_ids[:, :2])])


HALF, BFLOAT = ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def cast(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype != HALF:
        return tensor
    return ir.tensor(tensor.numpy().astype(ml_dtypes.bfloat16), BFLOAT, tensor.name)


def half_to_bfloat(model: ir.Model) -> None:
    """The same graph in bf16: traced once, not twice."""
    graph = model.graph
    for value in graph.initializers.values():
        assert value.const_value is not None
        value.const_value = cast(value.const_value)
    made = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *made):
        if value.dtype == HALF:
            value.dtype = BFLOAT
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == HALF:
            node.attributes["to"] = ir.AttrInt64("to", BFLOAT)
        if node.op_type == "Constant" and "value" in node.attributes:
            tensor = cast(node.attributes["value"].as_tensor())
            node.attributes["value"] = ir.AttrTensor("value", tensor)


def weight(model: ir.Model, name: str) -> ir.Value:
    (found,) = [v for v in model.graph.initializers.values() if (v.name or "").endswith(name)]
    return found


def change(value: ir.Value, by: Callable[[np.ndarray], np.ndarray]) -> None:
    """New numbers, computed in fp64, in the weight's dtype."""
    old = value.const_value
    assert old is not None
    numbers = by(old.numpy().astype(np.float64)).astype(old.numpy().dtype)
    value.const_value = ir.tensor(numbers, dtype=old.dtype, name=value.name)


def spoil(folder: Path, graph: str, bug: verify_bugs.Bug) -> Parts:
    """The parts of an artifact, one of them changed."""
    file = folder / "onnx" / f"{graph}.onnx"
    model = ir.load(file)
    bug(model)
    ir.save(model, file)
    raw = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    raw["files"] = {name: made.model_dump() for name, made in hash_files(folder).items()}
    (folder / "manifest.json").write_text(json.dumps(raw), encoding="utf-8")
    return Parts.of(folder, Manifest.load(folder))


def fills_its_range(name: str, largest: float) -> tuple[verify_bugs.Bug, list[str]]:
    """A weight whose numbers are finite, and what is made of them not: its reader's output."""
    expected = list[str]()

    def plant(model: ir.Model) -> None:
        value = weight(model, name)
        change(value, lambda old: old * (0.9 * largest / np.abs(old).max()))
        ((reader, _),) = value.uses()
        expected.append(f"'{reader.outputs[0].name}' ({reader.op_type} '{reader.name}'")

    return plant, expected


def holds_nan(name: str, _: float) -> tuple[verify_bugs.Bug, list[str]]:
    """In the last column of every row: some row of a table is read."""
    expected = list[str]()

    def spoilt(old: np.ndarray) -> np.ndarray:
        old[..., -1] = np.nan
        return old

    def plant(model: ir.Model) -> None:
        value = weight(model, name)
        change(value, spoilt)
        expected.append(f"the weight '{value.name}' holds NaN")

    return plant, expected


OVERFLOWS = [
    *((DECODER, f"layers.0.{part}.weight", ", layer 0)") for part in
      ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")),
    *((DECODER, f"layers.1.{part}.weight", ", layer 1)") for part in
      ("input_layernorm", "self_attn.k_proj", "post_attention_layernorm", "mlp.up_proj")),
    (DECODER, "layers.2.mlp.down_proj.weight", ", layer 2)"),
    (DECODER, "lm_head.weight", "')"),
    (VISION, "encoder.layers.0.mlp.fc1.weight", ", layer 0)"),
    (VISION, "multi_modal_projector.linear_2.weight", "')"),
]  # fmt: skip
NANS = [
    (DECODER, "layers.0.input_layernorm.weight", ", layer 0 reads it"),
    (DECODER, "layers.1.self_attn.o_proj.weight", ", layer 1 reads it"),
    (DECODER, "layers.2.mlp.up_proj.weight", ", layer 2 reads it"),
    (DECODER, "language_model.norm.weight", "' reads it"),
    (VISION, "patch_embedding.weight", "' reads it"),
    (VISION, "encoder.layers.0.self_attn.v_proj.bias", ", layer 0 reads it"),
    (TABLE, "embed_tokens.weight", "' reads it"),
]
PLANTS = [(fills_its_range, *each) for each in OVERFLOWS] + [(holds_nan, *each) for each in NANS]


@pytest.mark.parametrize("number", range(20), ids=lambda n: PLANTS[n][2])
def test_the_first_tensor_out_of_range_is_named(
    number: int, exports: Exports, tmp_path: Path
) -> None:
    make, graph, name, layer = PLANTS[number]
    dtype = list(LARGEST)[number % 2]
    bug, expected = make(name, LARGEST[dtype])
    parts = spoil(copy_of(exports.folders[dtype], tmp_path), graph, bug)
    said = beyond(parts, exports.cases)
    assert expected[0] in said
    assert layer in said
    assert said.endswith("of batch")


def copy_of(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place / "copy"))


def beyond(parts: Parts, cases: list[Case]) -> str:
    """Graph after graph, as ``check_range`` looks at them."""
    if said := beyond_in_features(parts, cases):
        return said
    inputs = embed(parts, cases, encode(parts, cases))
    return beyond_in_embeddings(parts, inputs) or beyond_in_decoder(parts, inputs)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", LARGEST)
def test_a_clean_model_raises_no_alarm(
    dtype: str, seed: int, exports: Exports, tmp_path: Path
) -> None:
    """Other weights each time; up to half of the range, and infinite where masks are filled."""
    random = np.random.default_rng(seed)

    def draw(model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            if (value.name or "").endswith("proj.weight"):
                change(value, lambda old: random.normal(0, old.std(), old.shape))
        last = weight(model, "layers.2.mlp.down_proj.weight") if seed else None
        if last is not None:
            change(last, lambda old: old * (2e3 / np.abs(old).max()))

    parts = spoil(copy_of(exports.folders[dtype], tmp_path), DECODER, draw)
    assert beyond(parts, exports.cases) == ""


@pytest.mark.parametrize("number", [3, 12, 19], ids=lambda n: PLANTS[n][2])
def test_the_failed_gate_says_so(number: int, exports: Exports, tmp_path: Path) -> None:
    make, graph, name, _ = PLANTS[number]
    bug, expected = make(name, LARGEST["fp16"])
    parts = spoil(copy_of(exports.folders["fp16"], tmp_path), graph, bug)
    gates = compare(parts, exports.cases, BARS["fp16"])
    failed = next(gate for gate in gates if not gate.passed)
    assert expected[0] in failed.detail
    assert failed.name == ("vision_encoder.cosine" if graph == VISION else "forced.prefill.cosine")


def test_infinities_that_fill_a_mask_are_no_news() -> None:
    """A float mask of zeros and infinities is as it should be; what follows from it is not."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[2] x, bool[2] seen) => (float[2] y)
       <float zero = {0.0}, float minus = {-inf}, float[2] weights = {1.0, inf}>
    {
        bias = Where (seen, zero, minus)
        masked = Add (x, bias)
        y = Mul (masked, weights)
    }"""
    graph = ir.from_onnx_text(text).graph
    clean, inf = Range(2.0, 1.0), Range(np.inf, np.inf)
    by_name = {v.name: v for n in graph for v in (*n.inputs, *n.outputs) if v is not None}
    ranges = {by_name[name]: clean for name in ("x", "zero")}
    ranges |= {by_name[name]: inf for name in ("minus", "bias", "masked", "weights", "y")}
    assert first_beyond(graph, ranges) == ""
    ranges |= {by_name[name]: clean for name in ("minus", "bias", "masked")}
    assert first_beyond(graph, ranges).startswith("the weight 'weights' holds infinity")
    ranges[by_name["weights"]] = clean
    assert first_beyond(graph, ranges).startswith("'y' (Mul")


def test_an_artifact_is_checked_by_what_it_carries(exports: Exports, tmp_path: Path) -> None:
    folder = copy_of(exports.folders["fp16"], tmp_path)
    with pytest.raises(ArtifactError, match="no golden vectors"):
        check_range(folder)
    write_golden(exports.cases, folder / "golden")
    bug, expected = holds_nan("layers.1.mlp.up_proj.weight", 0)
    for plant in (lambda model: None, bug):
        spoil(folder, DECODER, plant)
        said = check_range(folder)
        assert (expected[0] in said) if expected else (said == "")
