"""The lowering for TensorRT 10 says what the decoder says, in operators that are in its table."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from cut_graphs import Array, Client, Traced, Tracer
from graph_texts import graph
from onnx_ir.passes.common import ShapeInferencePass
from test_families import LLAVA_7B
from test_parity import CASES, Pair, turn, words
from test_tensorrt_builds import build, needs_tensorrt, saved

from vtr_export import compile as compiler
from vtr_export.backends.tensorrt.operators import refused
from vtr_export.families import read_facts
from vtr_export.passes.decompose import Decompose
from vtr_export.plan import plan
from vtr_export.reference import Reference
from vtr_export.schedule import Resolved, Schedule
from vtr_export.tensorrt_10 import OPERATORS, OPSET, SINCE, needed, verdict

LLAVA = read_facts(LLAVA_7B, "config.json")
SPOKEN = ("next_text_max", "inside_repacked", "per_image_next")  # every operator, run
PARTS = ("vision_encoder", "embed_tokens")


def lowered(model: ir.Model) -> ir.Model:
    """What TensorRT 10 is given, its types known."""
    model = compiler.run(compiler.tensorrt_10(), model)
    ShapeInferencePass(data_prop=False)(model)
    return model


def operators(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


def converse(tiny: Traced, schedule: Resolved, model: ir.Model) -> None:
    """Images and questions, an answer, another image: every tensor equals the reference's."""
    generator = torch.Generator().manual_seed(4)
    reference = Reference(tiny.model.model.language_model, tiny.model.lm_head, schedule)
    both = Pair(reference, Client(model))
    both(*turn(tiny, [1, 2, 0], generator))
    for count in (1, 1):
        both(*words(tiny, 3, count, generator))
    both(*turn(tiny, [1, 0, 2], generator))
    both(*words(tiny, 3, 4, generator))


@pytest.mark.parametrize("case", SPOKEN)
def test_a_lowered_decoder_equals_the_reference(case: str, traced: Tracer) -> None:
    tiny = traced("llama")
    cuts, options = CASES[case]
    schedule = tiny.schedule(cuts, **options)
    converse(tiny, schedule, lowered(tiny.cut(schedule)))


def test_every_decoder_is_of_operators_in_the_table(traced: Tracer) -> None:
    tiny = traced("fp16")
    for cuts, options in CASES.values():
        schedule = tiny.schedule({k: v for k, v in cuts.items() if k < 3}, **options)
        model = lowered(tiny.cut(schedule))
        assert (model.graph.opset_imports, dict(model.functions)) == ({"": OPSET}, {})
        assert refused(model) == ()
        assert operators(model) <= needed(schedule)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("variant", ["llama", "fp16"])
def test_the_other_parts_are_lowered_too(variant: str, part: str, traced: Tracer) -> None:
    tiny = traced(variant)
    shared = compiler.shared_weights(tiny.graphs)
    passes = (*compiler.canonical(), *compiler.copied(shared))
    model = compiler.run(passes, getattr(tiny.graphs, part).clone())
    given = model.graph.inputs[0]
    feeds: dict[str, Array] = {
        "input_ids": np.arange(6).reshape(2, 3),
        "pixel_values": np.random.default_rng(0).standard_normal((2, *_image(given))),
    }
    dtype = given.dtype.numpy() if given.dtype is not None else np.float32
    fed = {str(given.name): feeds[str(given.name)].astype(dtype)}
    expected = Client(model.clone()).session.run(None, fed)
    model = lowered(model)
    assert refused(model) == ()
    gate = {np.float32: 1e-5, np.float16: 2e-2}[expected[0].dtype.type]
    for actual, wanted in zip(Client(model).session.run(None, fed), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=gate)


def _image(given: ir.Value) -> list[int]:
    assert given.shape is not None
    return [dim if isinstance(dim, int) else 1 for dim in given.shape][1:]


def test_in_fp16_it_keeps_the_same_tokens_and_says_the_same(traced: Tracer) -> None:
    tiny = traced("fp16")
    schedule = tiny.schedule({1: 8, 2: 3})
    canonical, model = tiny.cut(schedule), lowered(tiny.cut(schedule))
    assert refused(model) == ()
    clients = Client(canonical), Client(model)
    rng = np.random.default_rng(0)
    for text, vision, past in ((6, 16, 0), (1, 0, 22), (5, 16, 23), (1, 0, 44)):
        feeds = _call(rng, text, vision, past)
        expected, actual = (client(**feeds) for client in clients)
        for name, wanted in expected.items():
            if wanted.dtype == np.int64:
                np.testing.assert_array_equal(actual[name], wanted, err_msg=name)
            else:
                assert _cosine(actual[name], wanted) > 0.9999, name


def _call(rng: np.random.Generator, text: int, vision: int, past: int) -> dict[str, Array]:
    length = text + vision
    return {
        "inputs_embeds": rng.standard_normal((2, length, 64)).astype(np.float16),
        "attention_mask": np.ones((2, past + length), np.int64),
        "position_ids": np.tile(np.arange(past, past + length), (2, 1)),
        "vision_index": np.tile(np.arange(1, vision + 1), (2, 1)),
    }


def _cosine(left: Array, right: Array) -> float:
    a, b = (array.astype(np.float64).reshape(-1) for array in (left, right))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) if a.any() or b.any() else 1.0


@needs_tensorrt
def test_its_nearest_living_relative_builds_it(traced: Tracer, tmp_path: Path) -> None:
    """TensorRT 10 needs a GPU; TensorRT-RTX builds the same file, attention written out."""
    tiny = traced("fp16")
    found = build(saved(lowered(tiny.cut(tiny.schedule({1: 8}))), tmp_path))
    assert "ATTENTION_INPUT" not in found["layers"]
    assert found["layers"]["SOFTMAX"] == tiny.facts.layers + 1
    assert found["types"]["SOFTMAX"] == {"FLOAT": tiny.facts.layers + 1}


@needs_tensorrt
def test_turing_takes_a_cut_from_the_plugin_only(traced: Tracer, tmp_path: Path) -> None:
    """What ``vtr plan`` says of SM 7.5, asked of TensorRT-RTX; here, where a trace is at hand."""
    tiny = traced("fp16")
    path = saved(tiny.cut(tiny.schedule({1: 8})), tmp_path)
    with pytest.raises(AssertionError, match="FP32 GEMM"):
        build(path, "--sm", "75")
    assert len(build(path, "--sm", "75,86", "--plugin", "python")["plugins"]) == 1
    assert build(saved(tiny.cut(tiny.schedule({})), tmp_path), "--sm", "75")["plan_bytes"] > 0


def test_what_every_choice_needs_is_in_the_table_and_used(traced: Tracer) -> None:
    tiny = traced("fp16")  # a tied head, multiplied by a Gemm
    chosen = {"query": "text", "heads": "max", "source": "next"}
    chosen |= {"rank": "per_image", "positions": "repacked", "drop_point": "inside"}
    for options in ({}, *({name: value} for name, value in chosen.items())):
        schedule = tiny.schedule({1: 3}, **options)
        assert needed(schedule) == operators(lowered(tiny.cut(schedule)))
    assert needed(tiny.schedule({})) < needed(tiny.schedule({1: 3})) < set(OPERATORS)


def test_an_operator_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPERATORS, "TopK")  # type: ignore[arg-type]  # a literal dict
    schedule = Schedule.fastv().resolve(LLAVA)
    assert verdict(schedule) == "no: TensorRT 10.3 has no TopK"
    assert verdict(Schedule.unpruned().resolve(LLAVA)).startswith("yes")


def test_the_canonical_graph_is_not_for_tensorrt_10(traced: Tracer) -> None:
    tiny = traced("llama")
    model = tiny.cut(tiny.schedule({1: 8}))
    ShapeInferencePass(data_prop=False)(model)
    reasons = " ".join(refused(model))
    for word in ("opset 24", "domain vtr", *(set(SINCE) - {"TensorScatter"}), "10.14", "10.15"):
        assert word in reasons


X, IDS, K = "float[n,4] x", "int64[n,4] i", "int64[1] k"
REFUSALS: dict[str, tuple[str, str, str]] = {
    "a type": (f"({IDS}) => (int64[n,4] y)", "a = Constant <value_int: int = 1> () y = CumSum (i, a)", "INT64"),
    "an unsorted TopK": (f"({X}, {K}) => (float[n,m] y)", "y, _i = TopK <sorted: int = 0> (x, k)", "sorted"),
    "axes that are computed": (f"({X}, {K}) => (float[n,1] y)", "y = ReduceSum (x, k)", "input 1"),
    "a scatter that adds": (f'({X}, {IDS}) => (float[n,4] y)', 'y = ScatterElements <reduction: string = "add"> (x, i, x)', "reduction"),
    "a second output": ("(float[2,4] x, float[4] w) => (float[2,4] y, float[2,1] m)", "y, m = LayerNormalization (x, w)", "outputs"),
    "a squeeze of all": ("(float[n,1] x) => (float[n] y)", "y = Squeeze (x)", "axes"),
    "an unknown operator": (f"({X}) => (float[n,4] y)", "y = Sinh (x)", "not in the table"),
    "a newer opset": (f"({X}) => (float[n,4] y)", "y = Add (x, x)", "opset 24"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_parser_would_not_take_is_named(name: str) -> None:
    signature, body, word = REFUSALS[name]
    assert any(word in reason for reason in refused(graph(signature, body)))


def test_a_tunable_budget_is_lowered_too(traced: Tracer) -> None:
    tiny = traced("llama")
    assert refused(lowered(tiny.cut(tiny.schedule({1: 8}), tunable=True))) == ()


def test_a_plan_says_whether_it_parses() -> None:
    options: dict[str, Any] = {"target": "tensorrt-10", "sms": (87,)}
    done = plan(Schedule.fastv(), LLAVA, **options)
    assert done.parses is not None
    assert done.parses.startswith("yes")
    assert "not executed" in done.parses
    assert plan(Schedule.fastv(), LLAVA, target="tensorrt", sms=(87,)).parses is None


def test_a_plan_counts_the_scores_of_attention_that_is_written_out() -> None:
    long: dict[str, Any] = {"device": "orin-nx", "text_tokens": 9000, "sms": (87,)}
    fused = plan(Schedule.fastv(), LLAVA, target="tensorrt", **long)
    written = plan(Schedule.fastv(), LLAVA, target="tensorrt-10", **long)
    assert written.peak_bytes > fused.peak_bytes


def test_lowering_twice_is_once(traced: Tracer) -> None:
    tiny = traced("llama")
    model = lowered(tiny.cut(tiny.schedule({1: 8})))
    assert not Decompose()(model).modified
