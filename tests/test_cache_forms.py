"""Forms of the cache: the same numbers, what each copies, and queries scaled so that none does."""

import importlib.util
from dataclasses import replace
from importlib import import_module as load
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graph_texts import Session, applied, graph, normal, op_types, untouched
from test_engine_network import parsed

from vtr_export.passes.scale_queries import ScaleQueries

BENCH = Path(__file__).parents[1] / "samples" / "bench"
WHEEL = "tensorrt_rtx_bindings"
NEEDS_WHEEL = pytest.mark.skipif(
    importlib.util.find_spec(WHEEL) is None,
    reason=f"{WHEEL} is not installed: pip install 'vtr-export[rtx]' (x86-64 Linux)",
)


# --- the same numbers in a cache of fixed length ---

CAPACITY = 70


class Loop:
    """Carries what a call presents to the next one; an empty cache is what the signature says."""

    def __init__(self, model: ir.Model) -> None:
        self.session, self.cache = Session(model), dict[str, np.ndarray[Any, Any]]()

    def __call__(self, feeds: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        batch = len(feeds["inputs_embeds"])
        for name, value in self.session.inputs.items():
            if name.startswith("past") and name not in self.cache:
                tail = [dim if isinstance(dim, int) else 0 for dim in value.shape[1:]]
                kind = np.int64 if "mask" in name else np.float32
                self.cache[name] = np.zeros((batch, *tail), kind)
        found = self.session({**feeds, **self.cache})
        for past in self.cache:
            present = past.replace("past_key_values.", "present.").replace("past_m", "present_m")
            self.cache[past] = found[present]
        return found


def calls() -> list[dict[str, np.ndarray[Any, Any]]]:
    """Two rows, the second padded in front: a prompt, two single tokens, a later turn, a token."""
    generator, made = np.random.default_rng(5), []
    mask = np.zeros((2, 0), np.int64)
    for new, pads, vision in ((24, 3, 16), (1, 0, 0), (1, 0, 0), (21, 2, 16), (1, 0, 0)):
        current = np.ones((2, new), np.int64)
        current[1, :pads] = 0
        mask = np.concatenate([mask, current], 1)
        columns = np.arange(4, 4 + vision)
        made.append(
            {
                "inputs_embeds": generator.normal(size=(2, new, 64)).astype(np.float32),
                "attention_mask": mask,
                "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, -new:],
                "vision_index": np.stack([columns, columns]),
            }
        )
    return made


@pytest.mark.parametrize("window", ["", "always", "prompts"])
def test_a_static_cache_computes_what_a_growing_one_does(bench: None, window: str) -> None:
    """Padded rows, cuts, later turns and single tokens; what is not filled stays as it was."""
    graphs = load("cache_graphs")
    toy = graphs.Toy(tokens=16)
    model = graphs.decoder(toy, "float")
    form = graphs.Form("", update="TensorScatter", window=window)
    grown, static = Loop(model), Loop(graphs.rewritten(model, form, CAPACITY))
    for feeds in calls():
        expected, found = grown(feeds), static(feeds)
        for name, wanted in expected.items():
            actual = found[name]
            if name.startswith("present."):
                assert actual.shape[2] == CAPACITY
                assert not actual[:, :, wanted.shape[2] :].any()
                actual = actual[:, :, : wanted.shape[2]]
            np.testing.assert_allclose(actual, wanted, atol=2e-5, err_msg=name)
    assert {value.shape[2] for name, value in grown.cache.items() if "key" in name} == {48, 32, 20}


# --- bytes ---


def test_rows_are_counted_as_by_hand(bench: None) -> None:
    """Three columns before the call, one new, room for ten."""
    forms, graphs = load("cache_forms"), load("cache_graphs")
    known, at = {form.name: form for form in graphs.FORMS}, forms.Lengths(3, 1, 10)
    reads_past, writes_all, writes_scaled, attends = 3 + 3, 4 + 4, 4, 4 + 4
    copied_by_window = (4 + 4) + (4 + 4)
    counted = {
        "concat": reads_past + writes_all + writes_scaled + attends,
        "concat, queries scaled": reads_past + writes_all + attends,
        "static": 1 + 1 + 10 + 10,
        "static, window": 1 + 1 + copied_by_window + attends,
        "static, ONNX": 1 + 1 + 10 + 10,
    }
    counted["static, window of prompts"] = counted["static"]
    assert {name: forms.rows_moved(known[name], at) for name in counted} == counted
    prompt, window = forms.Lengths(0, 4, 10), 4 + 4 + copied_by_window + attends
    assert forms.rows_moved(known["static, window of prompts"], prompt) == window
    assert forms.rows_moved(known["static"], prompt) == 4 + 4 + 10 + 10


def test_bytes_of_the_7b_shape_are_those_computed_by_hand(bench: None) -> None:
    forms, graphs = load("cache_forms"), load("cache_graphs")
    shape, concat, row_bytes = load("models").SHAPES["llava-7b"], graphs.FORMS[0], 32 * 128 * 2
    scaled, static = graphs.FORMS[1], graphs.FORMS[4]
    plans = forms.schedules(32)
    whole, fastv = forms.step(plans["unpruned"], 700), forms.step(plans["FastV(2, 50%)"], 700)
    assert forms.bytes_moved(concat, shape, whole) == 32 * (2 * 699 + 5 * 700) * row_bytes
    rows = 2 * (2 * 699 + 4 * 700) + 30 * (2 * 411 + 4 * 412)
    assert forms.bytes_moved(scaled, shape, fastv) == rows * row_bytes
    assert forms.bytes_held(concat, shape, fastv) == 2 * (2 * 1399 + 30 * 823) * row_bytes
    wide = forms.step(plans["pyramid(50%)"], 700, 4096)
    assert forms.bytes_moved(static, shape, wide) == 32 * (2 + 2 * 4096) * row_bytes
    assert forms.bytes_held(static, shape, wide) == 32 * 2 * 4096 * row_bytes
    assert [at.total for at in forms.step(plans["pyramid(50%)"], 700)] == (
        [700] * 8 + [412] * 8 + [268] * 8 + [196] * 8
    )
    grouped = replace(shape, kv_heads=8)
    assert 4 * forms.bytes_moved(concat, grouped, whole) == forms.bytes_moved(concat, shape, whole)
    assert forms.weight_bytes(shape) == 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064)


# --- what TensorRT makes of them ---


@NEEDS_WHEEL
def test_what_is_copied_in_generation_shows_in_the_plan(bench: None) -> None:
    """Keys that are scaled behind Concat are; no other form copies, and all are fused."""
    forms, graphs = load("cache_forms"), load("cache_graphs")
    toy = graphs.Toy(layers=2, heads=16, kv_heads=16, width=128, cuts={1: 8})
    known = {form.name: form for form in graphs.FORMS}
    scaled, beside, static = "concat, queries scaled", "concat, mask and lengths", forms.PROMPTS
    names = ("concat", scaled, beside, static, "static, ONNX")
    found = {name: forms.build_apart(known[name], "float16", toy, 4096) for name in names}
    for one in found.values():
        assert one["built"]
        assert one["kernels"] == ["_gemm_mha", "_gemv_mha"]
        assert one["attentions"] == 2
    copies = [one["copies"]["generation"] for one in found.values()]
    assert copies == [1, 0, 0, 0, 0]
    assert [one["in_place"] for one in found.values()] == [0, 0, 0, 4, 4]
    assert found[beside]["hashes"] == found[scaled]["hashes"] != found[static]["hashes"]


@NEEDS_WHEEL
def test_a_static_cache_is_as_long_as_the_engine_was_built_for(bench: None, tmp_path: Path) -> None:
    graphs = load("cache_graphs")
    form = next(form for form in graphs.FORMS if form.update == "TensorScatter")
    model = graphs.rewritten(graphs.decoder(graphs.Toy()), form, CAPACITY)
    fixed = ir.to_proto(model).SerializeToString()
    for value in model.graph.inputs:
        value.shape = ir.Shape(["room" if dim == CAPACITY else dim for dim in value.shape])
    opened = ir.to_proto(model).SerializeToString()
    found = parsed({"fixed": fixed, "open": opened}, tmp_path)
    assert found["fixed"]["errors"] == []
    assert "static sequence length" in found["open"]["errors"][0]


@NEEDS_WHEEL
def test_an_attention_without_a_fused_kernel_is_no_plan(bench: None) -> None:
    forms, graphs = load("cache_forms"), load("cache_graphs")
    toy = graphs.Toy(layers=2, cuts={1: 8})
    found = forms.build_apart(graphs.FORMS[0], "float", toy, 128)
    assert not found["built"]
    assert "not supported by a dedicated kernel" in found["why"]
    assert forms.build_apart(graphs.DECOMPOSED, "float", toy, 128)["kernels"] == ["_gemv_mha"]


# --- scale_queries ---

QKV = """(float[batch,2,rows,4] q, float[batch,2,keys,4] k, bool[batch,1,rows,keys] mask)
    => (float[batch,2,rows,4] y, float[batch,2,rows,4] z)"""
FEEDS = {
    "q": normal(2, 2, 3, 4),
    "k": normal(2, 2, 5, 4, seed=1),
    "mask": np.random.default_rng(2).random((2, 1, 3, 5)) < 0.8,
}


@pytest.mark.parametrize("scale", ["", "<scale: float = 0.3>"], ids=["from the width", "given"])
def test_scaled_queries_give_the_same_attention(scale: str) -> None:
    """Two attentions of one query; what else reads it reads it as it was."""
    body = f"y = Attention {scale} (q, k, k, mask) x = Attention (q, k, k, mask) z = Add (x, q)"
    model = applied(ScaleQueries(), graph(QKV, body), FEEDS)
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    assert [node.attributes["scale"].as_float() for node in attentions] == [1.0, 1.0]
    assert op_types(model).count("Mul") == 2


def test_a_query_that_says_too_little_keeps_its_attention() -> None:
    open_width = QKV.replace("rows,4]", "rows,width]").replace("keys,4]", "keys,width]")
    untouched(ScaleQueries(), graph(open_width, "y = Attention (q, k, k, mask) z = Identity (y)"))
    body = "y = Attention <scale: float = 1.0> (q, k, k, mask) z = Identity (y)"
    untouched(ScaleQueries(), graph(QKV, body))


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_scores_read_queries_as_they_were(bench: None, dtype: str) -> None:
    """They have a scale of their own; and the factor is of the decoder's type."""
    graphs = load("cache_graphs")
    toy = graphs.Toy()
    model = graphs.decoder(toy, dtype)
    ranked = [node.inputs[0] for node in model.graph if node.op_type == "VtrTopKPrune"]
    assert ScaleQueries()(model).modified
    assert [node.inputs[0] for node in model.graph if node.op_type == "VtrTopKPrune"] == ranked
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    assert len(attentions) == toy.layers
    for node in attentions:
        factor = ir.convenience.get_const_tensor(node.inputs[0].producer().inputs[1])
        assert factor is not None
        assert factor.dtype == node.inputs[1].dtype
        assert factor.numpy() == graphs.DTYPES[dtype].type(toy.width**-0.5)
