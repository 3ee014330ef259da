"""Operators written out say what they said, and what cannot be written out stays as it is."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Golden
from graph_texts import Array, applied, graph, load, normal, op_types, refused, run, untouched

from vtr_export.passes.decompose import Decompose
from vtr_export.passes.lower_opset import LowerOpset

CASE = Path(__file__).parents[1] / "graphs" / "decompose" / "grouped"
LATER = {"Attention", "RMSNormalization", "RotaryEmbedding", "CumSum"}


def attention(heads: int, kv_heads: int, inputs: str = "q, k, v, mask", **attributes: Any) -> Any:
    given = ", ".join(f"{name}: {kind} = {value}" for name, (kind, value) in attributes.items())
    return graph(
        f"""(float[batch,{heads},rows,4] q, float[batch,{kv_heads},total,4] k,
        float[batch,{kv_heads},total,6] v, bool[batch,1,rows,total] mask,
        float[batch,1,rows,total] bias) => (float[batch,{heads},rows,6] y)""",
        f"y = Attention {f'<{given}>' if given else ''} ({inputs})",
    )


def asked(heads: int, kv_heads: int) -> dict[str, Array]:
    mask = np.random.default_rng(0).random((2, 1, 3, 5)) < 0.5
    mask[..., 0] = True  # no row sees nothing
    return {
        "q": normal(2, heads, 3, 4, seed=1),
        "k": normal(2, kv_heads, 5, 4, seed=2),
        "v": normal(2, kv_heads, 5, 6, seed=3),
        "mask": mask,
        "bias": normal(2, 1, 3, 5),
    }


def defined(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    """Attention from its definition, head by head."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, h, i in np.ndindex(q.shape[:3]):
        kv = h * k.shape[1] // q.shape[1]
        logits = np.where(mask[b, 0, i], (k[b, kv].astype(float) @ q[b, h, i]) * scale, -np.inf)
        weights = np.exp(logits - logits.max())
        out[b, h, i] = weights @ v[b, kv] / weights.sum()
    return out


def test_all_of_it_becomes_its_golden(golden: Golden) -> None:
    model = load(CASE / "before.onnxtxt")
    Decompose()(model)
    LowerOpset(20)(model)
    golden(model, CASE / "after.onnxtxt")


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (6, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_written_out(heads: int, kv_heads: int, scale: float | None) -> None:
    given = {} if scale is None else {"scale": ("float", scale)}
    feeds = asked(heads, kv_heads)
    model = applied(Decompose(), attention(heads, kv_heads, **given), feeds)
    assert LATER.isdisjoint(op_types(model))
    expected = defined(*(feeds[name] for name in ("q", "k", "v", "mask")), scale or 0.5)
    np.testing.assert_allclose(run(model, feeds)["y"], expected, atol=1e-5)


def test_attention_without_a_mask_is_written_out() -> None:
    model = applied(Decompose(), attention(4, 2, "q, k, v"), asked(4, 2))
    assert "Where" not in op_types(model)


def test_a_row_that_sees_nothing_is_no_nan() -> None:
    model, feeds = attention(2, 1), asked(2, 1)
    Decompose()(model)
    feeds["mask"][0, 0, 1] = False
    assert np.isfinite(run(model, feeds)["y"]).all()


@pytest.mark.parametrize(
    "model",
    [
        attention(2, 2, is_causal=("int", 1)),
        attention(2, 2, softcap=("float", 3.0)),
        attention(2, 2, "q, k, v, bias"),
    ],
)
def test_attention_of_another_kind_is_refused(model: ir.Model) -> None:
    refused(Decompose(), model, "Attention")


def test_attention_with_a_past_is_refused() -> None:
    model = graph(
        """(float[1,2,1,4] q, float[1,2,1,4] k, bool[1,1,1,3] mask, float[1,2,2,4] past)
        => (float[1,2,1,4] y, float[1,2,3,4] now)""",
        "y, now, _v = Attention (q, k, k, mask, past, past)",
    )
    refused(Decompose(), model, "Attention")


NORM = "(float[batch,sequence,4] x, float[4] weight) => (float[batch,sequence,4] y)"


@pytest.mark.parametrize("options", ["", "<epsilon: float = 0.1>", "<axis: int = 2>"])
def test_a_norm_is_written_out(options: str) -> None:
    model = graph(NORM, f"y = RMSNormalization {options} (x, weight)")
    feeds = {"x": 1e-2 * normal(2, 3, 4), "weight": normal(4, seed=1)}
    assert LATER.isdisjoint(op_types(applied(Decompose(), model, feeds)))


def test_a_norm_over_more_than_features_is_refused() -> None:
    body = "y = RMSNormalization <axis: int = 1> (x, weight)"
    refused(Decompose(), graph(NORM, body), "axis")


TURN = """(float[batch,2,sequence,6] x, float[batch,sequence,3] cos, float[batch,sequence,3] sin)
    => (float[batch,2,sequence,6] y)"""


def test_a_rotation_is_written_out() -> None:
    model = graph(TURN, "y = RotaryEmbedding (x, cos, sin)")
    angle = normal(2, 5, 3, seed=1)
    feeds = {"x": normal(2, 2, 5, 6), "cos": np.cos(angle), "sin": np.sin(angle)}
    assert LATER.isdisjoint(op_types(applied(Decompose(), model, feeds)))


@pytest.mark.parametrize("option", ["interleaved", "rotary_embedding_dim"])
def test_a_rotation_of_another_kind_is_refused(option: str) -> None:
    body = f"y = RotaryEmbedding <{option}: int = {2 if '_' in option else 1}> (x, cos, sin)"
    text = TURN.replace("sequence,3]", "sequence,1]") if "_" in option else TURN
    refused(Decompose(), graph(text, body), option)


def counting(options: str = "", axis: int = 1, dtype: str = "int64") -> ir.Model:
    signature = f"({dtype}[batch,tokens] x) => ({dtype}[batch,tokens] y)"
    return graph(
        signature, f"a = Constant <value_int: int = {axis}> () y = CumSum {options} (x, a)"
    )


@pytest.mark.parametrize("tokens", [0, 1, 700])
def test_a_running_count_is_exact(tokens: int) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (3, tokens))
    model = applied(Decompose(), counting(), {"x": bits}, atol=0)
    assert "CumSum" not in op_types(model)


@pytest.mark.parametrize(
    "model",
    [counting("<exclusive: int = 1>"), counting("<reverse: int = 1>"), counting(axis=0)],
)
def test_counts_of_another_kind_are_refused(model: ir.Model) -> None:
    refused(Decompose(), model, "CumSum")


def test_sums_of_floats_are_refused() -> None:
    refused(Decompose(), counting(dtype="float"), "int64")


def test_a_squeezed_vector_names_its_axis() -> None:
    model = graph("(int64[1] x) => (int64 y)", "y = Squeeze (x)")
    assert len(applied(Decompose(), model, {"x": np.array([3])}).graph[-1].inputs) == 2


def test_what_an_older_opset_has_goes_back() -> None:
    model = graph("(float[n] x) => (float16[n] y)", "y = Cast <to: int = 10> (x)")
    assert LowerOpset(20)(model).modified
    assert (dict(model.opset_imports), model.ir_version) == ({"": 20}, 9)
    untouched(LowerOpset(20), model)


@pytest.mark.parametrize(
    ("signature", "body", "word"),
    [
        (NORM, "y = RMSNormalization (x, weight)", "RMSNormalization"),
        ("(float[n] x) => (float8e8m0[n] y)", 'y = Cast <to: int = 24, round_mode: string = "up"> (x)', "round_mode"),
        ("(float[b,s,2] x, int64[b,k] i) => (float[b,k,2] y)", "y = vtr.VtrNarrow (x, i)", "VtrNarrow"),
    ],
)  # fmt: skip
def test_what_is_newer_is_refused(signature: str, body: str, word: str) -> None:
    refused(LowerOpset(20), graph(signature, body), word)


def test_a_cast_to_the_type_of_another_value_names_it() -> None:
    signature = "(float[N] x, float16[M] like) => (float16[N] y)"
    model = graph(signature, "y = CastLike (x, like)")
    feeds: dict[str, Array] = {
        "x": np.array([1.0, 2.5], np.float32),
        "like": np.zeros(1, np.float16),
    }
    (node,) = applied(Decompose(), model, feeds).graph
    assert node.op_type == "Cast"
