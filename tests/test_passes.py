"""Each pass does what its docstring shows, keeps the numbers, once, and nothing else."""

import ast
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from cut_graphs import Tracer
from graph_texts import applied, bind, graph, normal, op_types, swept, untouched

import vtr_export.passes
from vtr_export.passes.fix_reshapes import FixReshapes
from vtr_export.passes.fold_constants import SMALL, FoldConstants
from vtr_export.passes.fuse_norms import FuseNorms
from vtr_export.passes.fuse_rotary import FuseRotary

HELPERS = {"__init__", "build", "compact_cache", "open_lengths"}  # no passes
FILES = sorted(Path(vtr_export.passes.__path__[0]).glob("*.py"))
FP32 = ir.DataType.FLOAT


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem not in HELPERS], ids=lambda path: path.stem
)
def test_a_file_holds_one_pass_of_its_name_that_shows_before_and_after(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    passes = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith("InPlacePass") for base in node.bases)
    ]
    assert [node.name for node in passes] == [path.stem.title().replace("_", "")]
    text = ast.get_docstring(passes[0]) or ""
    assert 0 < text.find("\nBefore::\n\n    ") < text.find("\nAfter::\n\n    ")


# --- fold_constants ---


def unreadable(name: str, *shape: int) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        raise AssertionError(f"{name} was read")

    return ir.LazyTensor(read, FP32, ir.Shape(shape), name=name)


COMPUTED_BOUNDS = """
    axis = Constant <value: tensor = int32 {1}> ()
    wide = Cast <to: int = 7> (axis)
    minus = Constant <value_ints: ints = [-1]> ()
    starts = Reshape (wide, minus)
    ends = Constant <value_ints: ints = [3]> ()
    axes = Constant <value_ints: ints = [0]> ()
    y = Slice (x, starts, ends, axes)
"""


def test_what_follows_from_constants_is_folded() -> None:
    model = applied(
        FoldConstants(),
        graph("(float[n,2] x) => (float[k,2] y)", COMPUTED_BOUNDS),
        {"x": normal(4, 2)},
    )
    assert set(swept(model)) == {"Constant", "Slice"}


def test_weights_are_never_read_and_stay_what_they_are() -> None:
    body = f"""
        {COMPUTED_BOUNDS.replace("(x,", "(same,").replace("y =", "part =")}
        same = Identity (w)
        turned = Transpose <perm: ints = [1, 0]> (w)
        size = Shape (w)
        sum = Add (part, v)
        y = MatMul (sum, turned)
    """
    lines = body.strip().splitlines()
    order = [*lines[-5:-2], *lines[:-5], *lines[-2:]]
    model = graph(
        "(float[4,2] w, float[2] v, float[4,2] idle) => (float[2,4] y, int64[2] size)",
        "\n".join(order),
    )
    weights = {
        "w": unreadable("w", 4, 2),
        "v": unreadable("v", 2),
        "idle": unreadable("idle", 4, 2),
    }
    bind(model, weights)
    assert FoldConstants()(model).modified
    for name, tensor in weights.items():
        assert model.graph.initializers[name].const_value is tensor
    assert "Transpose" in swept(model)
    assert "Add" in op_types(model)


def test_large_results_stay_computed() -> None:
    body = """
        shape = Constant <value_ints: ints = [{}]> ()
        one = Constant <value_float: float = 1.0> ()
        ones = Expand (one, shape)
        y = Add (x, ones)
    """
    for size, kept in ((SMALL, False), (SMALL + 1, True)):
        model = graph("(float[1] x) => (float[n] y)", body.format(size))
        FoldConstants()(model)
        assert ("Expand" in swept(model)) == kept


# --- fuse_norms ---

NORM = """
    two = Constant <value: tensor = float {2.0}> ()
    axes = Constant <value_ints: ints = [-1]> ()
    epsilon = Constant <value: tensor = float {0.001}> ()
    squares = Pow (x, two)
    mean = ReduceMean <keepdims: int = 1, noop_with_empty_axes: int = 0> (squares, axes)
    shifted = Add (mean, epsilon)
    root = Sqrt (shifted)
    factor = Reciprocal (root)
    normed = Mul (x, factor)
    y = Mul (normed, w)
"""
NORM_SIGNATURE = "(float[b,s,4] x, float[4] w) => (float[b,s,4] y)"


@pytest.mark.parametrize("last", ["y = Mul (normed, w)", "y = Mul (w, normed)"])
def test_a_norm_becomes_one_node(last: str) -> None:
    model = graph(NORM_SIGNATURE, NORM.replace("y = Mul (normed, w)", last))
    feeds = {"x": normal(2, 3, 4), "w": normal(4, seed=1)}
    node = applied(FuseNorms(), model, feeds).graph[-1]
    assert swept(model) == ["RMSNormalization"]
    assert node.attributes["stash_type"].as_int() == FP32


def test_a_norm_in_fp16_is_computed_in_fp32() -> None:
    wide = NORM.replace("Pow (x,", "Pow (wide,").replace("Mul (x,", "Mul (wide,")
    wide = wide.replace("normed = Mul", "normed_wide = Mul")
    body = "wide = Cast <to: int = 1> (x)" + wide.replace(
        "y =", "normed = Cast <to: int = 10> (normed_wide)\n y ="
    )
    signature = NORM_SIGNATURE.replace("float[", "float16[")
    feeds = {
        "x": 200 * normal(2, 3, 4, dtype=np.float16),  # its squares overflow
        "w": normal(4, seed=1, dtype=np.float16),
    }
    model = applied(FuseNorms(), graph(signature, body), feeds, atol=2e-3)
    assert swept(model) == ["RMSNormalization"]


def test_a_wider_scale_widens_what_is_normed() -> None:
    """Gemma multiplies by a scale in fp32 and rounds once, behind it."""
    wide = NORM.replace("Pow (x,", "Pow (wide,").replace("Mul (x,", "Mul (wide,")
    body = "wide = Cast <to: int = 1> (x)" + wide.replace("y =", "scaled =")
    body += "y = Cast <to: int = 10> (scaled)"
    signature = NORM_SIGNATURE.replace("float[b", "float16[b")
    feeds = {"x": 200 * normal(2, 3, 4, dtype=np.float16), "w": 1 + normal(4, seed=1)}
    model = applied(FuseNorms(), graph(signature, body), feeds, atol=2e-3)
    assert swept(model) == ["Cast", "RMSNormalization", "Cast"]
    norm = next(node for node in model.graph if node.op_type == "RMSNormalization")
    assert {value.dtype for value in (*norm.inputs, *norm.outputs)} == {ir.DataType.FLOAT}


NO_NORMS = {
    "over tokens": ("ints = [-1]", "ints = [1]"),
    "over tokens and features": ("ints = [-1]", "ints = [1, 2]"),
    "of cubes": ("{2.0}", "{3.0}"),
    "another epsilon for each feature": ("float {0.001}", "float[4] {0.001, 0.1, 0.2, 0.3}"),
    "of another value": ("Mul (x, factor)", "Mul (other, factor)"),
    "scaled by an activation": ("Mul (normed, w)", "Mul (normed, gate)"),
    "scaled by tokens": ("Mul (normed, w)", "Mul (normed, rows)"),
}


@pytest.mark.parametrize("why", NO_NORMS)
def test_what_is_no_norm_stays(why: str) -> None:
    old, new = NO_NORMS[why]
    inputs = "float[b,s,4] x, float[4] w, float[b,s,4] other, float[b,s,4] gate, float[s,1] rows"
    assert old in NORM
    untouched(FuseNorms(), graph(f"({inputs}) => (float[b,s,4] y)", NORM.replace(old, new)))


# --- fix_reshapes ---

RESHAPE = """
    batch = Shape <start: int = 0, end: int = 1> (x)
    length = Shape <start: int = 1, end: int = 2> (x)
    rest = Constant <value_ints: ints = [{rest}]> ()
    target = Concat <axis: int = 0> ({order}, rest)
    y = Reshape (x, target)
"""


@pytest.mark.parametrize(
    ("order", "rest", "shape", "target"),
    [
        ("batch, length", "2, 3", "[b,s,2,3]", [0, 0, 2, 3]),
        ("batch, length", "6", "[b,s,6]", [0, 0, 6]),
        ("batch, length", "-1, 3", "[b,s,2,3]", [0, 0, 2, 3]),
        ("batch", "-1, 2, 3", "[b,s,2,3]", [0, 0, 2, 3]),
        ("batch", "-1", "[b,rest]", [0, -1]),
        ("length, batch", "6", "[s,any,6]", [-1, 0, 6]),
    ],
)
def test_a_computed_target_becomes_a_constant_where_shapes_tell_it(
    order: str, rest: str, shape: str, target: list[int]
) -> None:
    model = graph(f"(float[b,s,6] x) => (float{shape} y)", RESHAPE.format(order=order, rest=rest))
    if target[0] == -1:  # two open dimensions: which is which is not known
        return untouched(FixReshapes(), model)
    applied(FixReshapes(), model, {"x": normal(2, 5, 6)})
    assert swept(model) == ["Constant", "Reshape"]
    constant = ir.convenience.get_const_tensor(model.graph[-1].inputs[1])
    assert constant is not None
    assert constant.numpy().tolist() == target
    return None


def test_a_constant_target_is_left_alone() -> None:
    body = "target = Constant <value_ints: ints = [0, -1]> () y = Reshape (x, target)"
    untouched(FixReshapes(), graph("(float[b,s,6] x) => (float[b,n] y)", body))


# --- fuse_rotary ---

ROTARY = """
    table = Concat <axis: int = -1> (angles, angles)
    cos_rows = Cos (table)
    sin_rows = Sin (table)
    scale = Constant <value: tensor = float {1.5}> ()
    cos_scaled = Mul (cos_rows, scale)
    sin_scaled = Mul (sin_rows, scale)
    heads = Constant <value_ints: ints = [1]> ()
    cos = Unsqueeze (cos_scaled, heads)
    sin = Unsqueeze (sin_scaled, heads)
    zero = Constant <value_ints: ints = [0]> ()
    half = Constant <value_ints: ints = [2]> ()
    end = Constant <value_ints: ints = [9223372036854775807]> ()
    last = Constant <value_ints: ints = [3]> ()
    low = Slice (x, zero, half, last)
    high = Slice (x, half, end, last)
    minus = Neg (high)
    turned = Concat <axis: int = -1> (minus, low)
    straight = Mul (x, cos)
    across = Mul (turned, sin)
    y = Add (straight, across)
"""
ROTARY_INPUTS = "float[b,h,s,4] x, float[b,s,2] angles"
ORDERS = [
    ("Add (straight, across)", "Add (across, straight)"),
    ("Mul (x, cos)", "Mul (cos, x)"),
    ("Mul (turned, sin)", "Mul (sin, turned)"),
    ("[9223372036854775807]", "[4]"),
    ("ints = [3]", "ints = [-1]"),
]


@pytest.mark.parametrize("orders", [0, 1, 2, 3, 4, 5])
def test_a_rotation_by_halves_becomes_one_node(orders: int) -> None:
    body = ROTARY
    for old, new in ORDERS[:orders]:
        assert old in body
        body = body.replace(old, new)
    model = graph(f"({ROTARY_INPUTS}) => (float[b,h,s,4] y)", body)
    model = applied(FuseRotary(), model, {"x": normal(2, 3, 5, 4), "angles": normal(2, 5, 2)})
    left = swept(model)
    assert left.count("RotaryEmbedding") == 1
    assert not {"Concat", "Neg", "Slice", "Unsqueeze"} & set(left)


def test_rotations_share_their_narrow_tables() -> None:
    again = ROTARY[ROTARY.index("low =") :]
    for name in ("low", "high", "minus", "turned", "straight", "across"):
        again = again.replace(name, f"{name}_z")
    again = again.replace("(x,", "(y,").replace("y =", "z =")
    model = graph(f"({ROTARY_INPUTS}) => (float[b,h,s,4] y, float[b,h,s,4] z)", ROTARY + again)
    applied(FuseRotary(), model, {"x": normal(2, 3, 5, 4), "angles": normal(2, 5, 2)})
    left = swept(model)
    assert (left.count("RotaryEmbedding"), left.count("Cos"), left.count("Sin")) == (2, 1, 1)


TOKENS = {
    "ints = [3]": "ints = [2]",
    "turned = Concat <axis: int = -1>": "turned = Concat <axis: int = 2>",
}
NO_ROTATIONS: dict[str, dict[str, str]] = {
    "unequal parts": {"ints = [2]": "ints = [1]"},
    "halves of the tokens": TOKENS,
    "every other entry": {"(x, zero, half, last)": "(x, zero, end, last, half)"},
    "the other direction": {"(minus, low)": "(low, minus)"},
    "unequal tables": {"(angles, angles)": "(angles, others)"},
    "a scale for each entry": {"float {1.5}": "float[4] {1.0, 2.0, 3.0, 4.0}"},
    "heads behind tokens": {
        "heads = Constant <value_ints: ints = [1]>": "heads = Constant <value_ints: ints = [2]>"
    },
    "a table for all rows": {"(cos_scaled, heads)": "(single, heads)"},
    "another value": {"Mul (x, cos)": "Mul (z, cos)"},
}


@pytest.mark.parametrize("why", NO_ROTATIONS)
def test_what_is_no_rotation_by_halves_stays(why: str) -> None:
    body = """
        few_table = Concat <axis: int = -1> (few, few)
        single = Cos (few_table)
    """
    body += ROTARY
    for old, new in NO_ROTATIONS[why].items():
        assert body.count(old) == 1
        body = body.replace(old, new)
    more = "float[b,h,s,4] z, float[b,s,2] others, float[1,s,2] few"
    untouched(FuseRotary(), graph(f"({ROTARY_INPUTS}, {more}) => (float[i,j,k,l] y)", body))


# --- all of them, on what a checkpoint is traced to ---


def test_a_traced_decoder_becomes_canonical(traced: Tracer) -> None:
    tiny = traced("llama")
    model = tiny.cut(tiny.schedule({}))
    count, layers = Counter(op_types(model)), tiny.facts.layers
    assert count["RMSNormalization"] == 2 * layers + 1
    assert count["RotaryEmbedding"] == 2 * layers
    assert count["Attention"] == layers
    assert count["VtrCausalMask"] == 1
    assert not {"Shape", "Neg", "Pow", "ReduceMean", "Sqrt"} & set(count)
