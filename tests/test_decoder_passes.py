"""Passes on whole decoders and on weights that lie in a checkpoint, against numpy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from cut_oracle import Call, selected, visible
from decoder_oracle import Oracle, attend, drawn
from graph_texts import (
    Array,
    Session,
    applied,
    bind,
    graph,
    normal,
    op_types,
    read,
    refused,
    run,
    swept,
    untouched,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_insert_cuts import CASES, GATE, GRAPHS, SOFTCAP, before, cut, resolved, some_calls

from vtr_export.checkpoint import read_header
from vtr_export.passes.attach_mask import AttachMask
from vtr_export.passes.cast_linked import CastLinked
from vtr_export.passes.force_keep_sets import ForceKeepSets
from vtr_export.passes.stamp_layers import StampLayers
from vtr_export.passes.store_transposed import StoreTransposed
from vtr_export.passes.widen import Widen
from vtr_export.schedule import Resolved
from vtr_export.weights import CheckpointTensor

FP32, FP16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16

# --- attach_mask ---

MASKED = """(float[batch,sequence,4] inputs_embeds, bool[1,1,1,1] mask, float[batch,2,sequence,2] q,
    float[batch,2,total,2] k) => (float[batch,2,sequence,2] y, float[batch,2,sequence,2] z)"""
ATTENTIONS = "y = Attention (q, k, k, mask) z = Attention (q, y, y, mask)"


def test_every_attention_sees_real_keys_up_to_its_row() -> None:
    model = graph(MASKED, ATTENTIONS.replace("(q, y, y,", "(y, k, k,"))
    assert AttachMask()(model).modified
    assert [value.name for value in model.graph.inputs][:2] == ["inputs_embeds", "attention_mask"]
    padding = np.array([[0, 1, 1, 1, 1], [1, 0, 1, 1, 1]])
    feeds = {
        "inputs_embeds": normal(2, 3, 4),
        "attention_mask": padding,
        "q": normal(2, 2, 3, 2, seed=1),
        "k": normal(2, 2, 5, 2, seed=2),
    }
    mask, k = visible(padding, 3), feeds["k"].astype(float)
    outputs, query = run(model, feeds), feeds["q"].astype(float)
    for name in ("y", "z"):
        expected = attend(query, k, k, mask)
        actual = outputs[name].transpose(0, 2, 1, 3).reshape(2, 3, 4)
        np.testing.assert_allclose(actual, expected, atol=1e-5)
        query = expected.reshape(2, 3, 2, 2).transpose(0, 2, 1, 3)
    untouched(AttachMask(), model)


def test_a_mask_that_something_else_reads_is_no_stand_in() -> None:
    body = "y = Attention (q, k, k, mask) n = Not (mask) z = Attention (y, k, k, n)"
    refused(AttachMask(), graph(MASKED, body), "Not")


# --- stamp_layers ---

STACK = "model.layers"
LAYER = ("norm", "wq", "wk", "wv", "wo", "wm")


def three_layers() -> ir.Model:
    """The decoder of a golden, its layers' weights named as in a checkpoint, without data."""
    text = (GRAPHS / "two_cuts" / "before.onnxtxt").read_text(encoding="utf-8")
    model = read(text)
    for value in list(model.graph.inputs):
        name, _, number = (value.name or "").rpartition("_")
        if name in LAYER:
            model.graph.inputs.remove(value)
            value.name = f"{STACK}.{number}.{name}"
            model.graph.initializers[value.name] = value
    return model


@pytest.mark.parametrize("count", [4, 5, 8])
def test_stamped_layers_compute_what_as_many_written_ones_do(count: int) -> None:
    model = three_layers()
    assert StampLayers(count, STACK)(model).modified
    assert op_types(model).count("Attention") == count
    schedule = Resolved(count, 4, ())
    call = Call(np.ones((2, 1), np.int64), np.ones((2, 4), np.int64), np.array([[1, 2]] * 2))
    weights = {v.name or "": v for v in model.graph.initializers.values()}
    assert set(weights) == {f"{STACK}.{n}.{name}" for n in range(count) for name in LAYER}
    rng, feeds = np.random.default_rng(count), {}
    for name, value in weights.items():
        assert value.shape is not None
        array = rng.normal(size=value.shape.numpy()).astype(np.float32)
        value.const_value = ir.tensor(array, name=name)
        number, part = name.removeprefix(f"{STACK}.").split(".")
        feeds[f"{part}_{number}"] = array
    session = Session(model)
    pasts = [name for name in session.inputs if name.startswith("past")]
    parts = [f"{n}.{part}" for n in range(count) for part in ("key", "value")]
    assert pasts == [f"past_key_values.{part}" for part in parts]
    assert session.outputs == ["logits", *(f"present.{part}" for part in parts)]
    feeds |= drawn(session.inputs, call, seed=1)
    expected, actual = Oracle(schedule, feeds, call).decode().outputs, session(feeds)
    for name in session.outputs:
        np.testing.assert_allclose(actual[name], expected[name], rtol=GATE, atol=GATE)


def test_three_layers_are_three_and_two_are_refused() -> None:
    untouched(StampLayers(3, STACK), three_layers())
    refused(StampLayers(5, STACK), before("from_previous"), "2 attention nodes")


# --- force_keep_sets ---


class Told(Oracle):
    """Keeps what it is told."""

    def __init__(self, *args: Any, sets: list[tuple[Array, Array]]) -> None:
        super().__init__(*args)
        self.sets = sets

    def _choose(self, *args: Any) -> tuple[Array, Array]:
        return self.sets[self.stage]


def forced(case: str) -> Session:
    model = cut(before(case), resolved(case))
    assert ForceKeepSets()(model).modified
    untouched(ForceKeepSets(), model)
    swept(model)
    return Session(model)


@pytest.mark.parametrize("case", [case for case in CASES if case != "recycled"])
def test_a_decoder_keeps_what_it_is_told(case: str) -> None:
    schedule, session = resolved(case), forced(case)

    @settings(max_examples=10)
    @given(some_calls(schedule), st.integers(0, 2**32))
    def check(call: Call, seed: int) -> None:
        rng, stage, sets = np.random.default_rng(seed), call, []
        for item in schedule.cuts:
            tokens = stage.vision.shape[1]
            k = min(item.keep.of(call.vision.shape[1]), tokens)
            entries = [sorted(rng.permutation(tokens)[:k].tolist()) for _ in stage.vision]
            kept, vision = selected(stage, entries)
            sets.append((kept, vision))
            stage = Call(stage.past, np.take_along_axis(stage.current, kept, 1), vision)
        feeds = drawn(session.inputs, call, seed)
        for number, (kept, vision) in enumerate(sets):
            feeds |= {f"kept.{number}": kept, f"kept_vision.{number}": vision}
        told = Told(schedule, feeds, call, SOFTCAP.get(case), sets=sets)
        expected = told.decode().outputs
        actual = session(feeds)
        assert {name for name in expected if not name.startswith("kept")} == actual.keys()
        for name, array in actual.items():
            np.testing.assert_allclose(array, expected[name], rtol=GATE, atol=GATE)

    check()


def test_only_cuts_that_show_what_they_keep_can_be_forced() -> None:
    model = cut(before("two_cuts"), resolved("two_cuts"))
    kept = next(value for value in model.graph.outputs if value.name == "kept.1")
    model.graph.outputs.remove(kept)
    refused(ForceKeepSets(), model, "does not show what it keeps")
    untouched(ForceKeepSets(), before("two_cuts"))


# --- store_transposed, cast_linked ---


def stored(folder: Path, **arrays: Array) -> dict[str, CheckpointTensor]:
    """Tensors of a checkpoint, in fp32 whatever they are stored in."""
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "model.safetensors")
    refs, _ = read_header(folder / "model.safetensors")
    return {name: CheckpointTensor(ref, name=name, dtype=FP32) for name, ref in refs.items()}


def with_weights(model: ir.Model, weights: Mapping[str, ir.TensorProtocol]) -> ir.Model:
    bind(model, weights)
    return model


PRODUCT = "(float[b,{rows},3] x, float[5,3] w) => (float[b,{rows},5] y)"
TURNED = "t = Transpose <perm: ints = [1, 0]> (w) y = MatMul (x, t)"


@pytest.mark.parametrize("users", [1, 2])
def test_a_weight_is_stored_the_way_it_is_multiplied(users: int, tmp_path: Path) -> None:
    body = TURNED
    if users == 2:
        body = TURNED.replace("y =", "z =").replace("t ", "s ").replace("t)", "s)") + TURNED
        body = body.replace("y = MatMul (x, t)", "zz = MatMul (x, t) y = Add (z, zz)")
    weights = stored(tmp_path, w=normal(5, 3, seed=1))
    model = with_weights(graph(PRODUCT.format(rows="s"), body), weights)
    applied(StoreTransposed(), model, {"x": normal(2, 4, 3)})
    assert "Transpose" not in op_types(model)
    value = model.graph.initializers["w"]
    assert isinstance(value.const_value, CheckpointTensor)
    assert value.const_value.transpose
    assert str(value.shape) == "[3,5]"


def test_a_shared_weight_stays_as_it_is_and_is_read_so(tmp_path: Path) -> None:
    weights = stored(tmp_path, w=normal(5, 3, seed=1))
    model = with_weights(graph(PRODUCT.format(rows="1"), TURNED), weights)
    applied(StoreTransposed({"w"}), model, {"x": normal(2, 1, 3)})
    assert swept(model) == ["Constant", "Squeeze", "Gemm", "Unsqueeze"]
    assert model.graph.initializers["w"].const_value is weights["w"]


LEFT_ALONE = {
    "it is read as it lies, too": (frozenset(), "1", TURNED + " z = Gather (w, x_index)"),
    "the transpose is an output": (frozenset(), "1", TURNED.replace("t =", "out =").replace("t)", "out)")),
    "the axes stay": (frozenset(), "1", "t = Transpose <perm: ints = [0, 1]> (w) s = Transpose (t) y = MatMul (x, s)"),
    "shared, for many rows": (frozenset({"w"}), "s", TURNED),
    "shared, on the left": (frozenset({"w"}), "1", "t = Transpose <perm: ints = [1, 0]> (w) y = Add (x, x) u = MatMul (t, v)"),
}  # fmt: skip


@pytest.mark.parametrize("why", LEFT_ALONE)
def test_a_weight_that_is_used_otherwise_is_left_alone(why: str, tmp_path: Path) -> None:
    shared, rows, body = LEFT_ALONE[why]
    more = "float[5,2] v, int64[n] x_index"
    also = ", float[3,5] out" if "out =" in body else ""
    signature = f"(float[b,{rows},3] x, float[5,3] w, {more}) => (float[b,{rows},m] y{also})"
    model = with_weights(graph(signature, body), stored(tmp_path, w=normal(5, 3)))
    untouched(StoreTransposed(shared), model)


def test_weights_that_are_in_the_graph_are_left_alone() -> None:
    model = graph(PRODUCT.format(rows="1"), TURNED)
    untouched(StoreTransposed(), with_weights(model, {"w": ir.tensor(normal(5, 3), name="w")}))


def test_a_linked_weight_is_cast_in_the_graph(tmp_path: Path) -> None:
    half = {
        name: normal(*shape, dtype=np.float16) for name, shape in (("w", (5, 3)), ("idle", (2,)))
    }
    arrays = {**half, "kept": normal(5)}
    signature = "(float[b,s,3] x, float[5,3] w, float[5] kept, float[2] idle) => (float[b,s,5] y)"
    body = TURNED.replace("y =", "p =") + " y = Add (p, kept)"
    weights = stored(tmp_path, **arrays)
    model = with_weights(graph(signature, body), weights)
    applied(CastLinked(), model, {"x": normal(2, 4, 3)})
    assert op_types(model) == ["Cast", "Transpose", "MatMul", "Add"]
    dtypes = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert dtypes == {"w": FP16, "kept": FP32, "idle": FP32}


# --- widen ---

TYPED = """(float16[2] x, int64[2] n) => (float16[2] y, float16[2] z, int64[2] m)"""
TYPED_BODY = """
    y = Mul (x, w)
    plus = Add (y, w)
    z = Sub (plus, y)
    m = Add (n, n)
"""


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["fp16", "bf16"])
def test_every_result_is_rounded_where_it_is_made(dtype: Any) -> None:
    """2049 is no fp16, 257 no bf16, and 90000 beyond fp16."""
    typed = ir.DataType.from_numpy(np.dtype(dtype))
    name = "float16" if typed == FP16 else "bfloat16"
    signature = TYPED.replace("float16[2] x,", "float16[2] x, float16[2] w,")
    model = graph(signature.replace("float16", name), TYPED_BODY)
    w = np.array([3, 300], dtype)
    bind(model, {"w": ir.tensor(w, dtype=typed, name="w")})
    assert Widen()(model).modified
    untouched(Widen(), model)
    x = np.array([683, 300], dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        y = (x.astype(np.float32) * w.astype(np.float32)).astype(dtype)
        plus = (y.astype(np.float32) + w.astype(np.float32)).astype(dtype)
        z = (plus.astype(np.float32) - y.astype(np.float32)).astype(dtype)
    outputs = run(model, {"x": x.astype(np.float32), "n": np.array([1, 2])})
    np.testing.assert_array_equal(outputs["y"], y.astype(np.float32))
    np.testing.assert_array_equal(outputs["z"], z.astype(np.float32))
    assert outputs["m"].tolist() == [2, 4]
    assert model.graph.initializers["w"].dtype == typed


def test_what_is_fp32_stays_and_what_cannot_be_told_is_refused() -> None:
    untouched(Widen(), graph("(float[2] x) => (float[2] y)", "y = Mul (x, x)"))
    text = """<ir_version: 11, opset_import: ["": 24, "ai.other": 1]>
        g (float16[2] x) => (float16[2] y) { u = ai.other.Twist (x) y = Neg (u) }"""
    refused(Widen(), ir.from_onnx_text(text), "dtype of 'u'")
    branches = """
        y = If (c) <then_branch = one () => (float16[2] a) { a = Neg (x) },
                    else_branch = two () => (float16[2] b) { b = Abs (x) }>
    """
    refused(
        Widen(), graph("(float16[2] x, bool c) => (float16[2] y)", branches), "graph of its own"
    )
