"""Token axes, layers and what a cut crosses: told by dataflow, whatever the names and the order."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import pytest
from graph_texts import graph, read
from hypothesis import given, settings
from hypothesis import strategies as st
from test_insert_cuts import CASES, GRAPHS, before, cut, resolved

from vtr_export.analysis import Axes, Layer, find_layers, find_sites, label_axes, token_seeds
from vtr_export.analysis.axes import LENGTH, OPAQUE
from vtr_export.analysis.layers import ancestors, descendants
from vtr_export.errors import AnalysisError
from vtr_export.schedule import Cut, Keep, Resolved

NONE, LOST, COUNTED = Axes(), Axes(state=OPAQUE), Axes(state=LENGTH)
CONSTANTS = """
    zero = Constant <value_ints: ints = [0]> ()
    one = Constant <value_ints: ints = [1]> ()
    two = Constant <value_ints: ints = [2]> ()
    minus = Constant <value_ints: ints = [-1]> ()
    far = Constant <value_ints: ints = [9223372036854775807]> ()
    scalar = Constant <value_int: int = 1> ()
    pair = Constant <value_ints: ints = [1, 2]> ()
    heads = Constant <value_ints: ints = [0, 0, 2, 3]> ()
    merged = Constant <value_ints: ints = [0, -1]> ()
"""
INPUTS = """float[b,s,6] x, int64[b,s] ids, float[b,2,s,3] h, float[b,1,s,t] m, float[6,5] w,
    float[5,6] table, float[1,9,6] fixed, float[1,1,6] row, float[b,2,p,3] past, bool c, int64[t] at"""
SEEDS = {
    "x": Axes(token=1),
    "ids": Axes(token=1),
    "h": Axes(token=2),
    "m": Axes(token=2, key=3),
}


def labelled(body: str, output: str = "float[i,j,k,l] y") -> Axes:
    """The label of ``y``."""
    model = graph(f"({INPUTS}) => ({output})", CONSTANTS + body)
    seeds = {value: SEEDS[value.name] for value in model.graph.inputs if value.name in SEEDS}
    labels = label_axes(model.graph, seeds)
    return labels.get(model.graph.outputs[0], NONE)


FOLLOWED = {
    "the same axis": ("y = Tanh (x)", "b,s,6", Axes(1)),
    "a norm": ("y = LayerNormalization (x, row)", "b,s,6", Axes(1)),
    "a product with a weight": ("y = MatMul (x, w)", "b,s,5", Axes(1)),
    "a weight for each row": ("y = Mul (x, row)", "b,s,6", Axes(1)),
    "two streams": ("y = Add (x, x)", "b,s,6", Axes(1)),
    "the best features": ("y, best = TopK (x, two)", "b,s,2", Axes(1)),
    "a column for each row": (
        "i = Unsqueeze (ids, one) f = Cast <to: int = 1> (i) col = Unsqueeze (row, minus) "
        "y = MatMul (col, f)", "1,b,6,s", Axes(3)
    ),
    "heads": ("y = Reshape (x, heads)", "b,s,2,3", Axes(1)),
    "turned heads": (
        "r = Reshape (x, heads) y = Transpose <perm: ints = [0, 2, 1, 3]> (r)", "b,2,s,3", Axes(2)
    ),
    "turned round": ("y = Transpose (x)", "6,s,b", Axes(1)),
    "a new axis in front": ("y = Unsqueeze (x, zero)", "1,b,s,6", Axes(2)),
    "a new axis behind": ("y = Unsqueeze (ids, minus)", "b,s,1", Axes(1), "int64"),
    "copies in front": (
        "u = Unsqueeze (x, one) four = Constant <value_ints: ints = [4, 1, 1]> () y = Expand (u, four)",
        "b,4,s,6",
        Axes(2),
    ),
    "an axis gone": ("u = Unsqueeze (x, one) y = Squeeze (u, one)", "b,s,6", Axes(1)),
    "looked up": ("y = Gather (table, ids)", "b,s,6", Axes(1)),
    "aligned from the right": ("u = Unsqueeze (x, one) y = Add (u, x)", "b,i,s,6", Axes(2)),
    "keys": ("y = Concat <axis: int = -2> (past, h)", "b,2,n,3", Axes(key=2)),
    "both axes of a mask": ("y = Add (m, m)", "b,1,s,t", Axes(2, 3)),
    "queries and keys": ("k = Squeeze (m, one) y = Neg (k)", "b,s,t", Axes(1, 2)),
    "features put together": ("y = Concat <axis: int = 2> (x, x)", "b,s,12", Axes(1)),
    "a fused projection": ("z, y = Split <axis: int = -1, num_outputs: int = 2> (x)", "b,s,3", Axes(1)),
    "all rows": ("y = Slice (x, zero, far, one)", "b,s,6", Axes(1)),
    "some features": ("y = Slice (x, one, two, minus)", "b,s,1", Axes(1)),
    "the last row": ("y = Slice (x, minus, far, one)", "b,1,6", NONE),
    "the first row": ("y = Slice (x, zero, one, one)", "b,1,6", NONE),
    "one row": ("y = Gather <axis: int = 1> (x, scalar)", "b,6", NONE),
    "a mean over features": ("y = ReduceMean <keepdims: int = 0> (x, two)", "b,s", Axes(1)),
    "a mean over tokens": ("y = ReduceMean (x, one)", "b,1,6", NONE),
    "an attention": ("y = Attention (h, past, past)", "b,2,s,3", Axes(2)),
    "no tokens": ("y = MatMul (table, w)", "5,5", NONE),
    "another length": ("y = Shape <start: int = 2, end: int = 3> (x)", "1", NONE, "int64"),
}  # fmt: skip
LENGTHS = {
    "a length": ("y = Shape <start: int = 1, end: int = 2> (x)", "1", "int64"),
    "a size": ("y = Size (x)", "", "int64"),
    "a range of it": (
        "l = Shape <start: int = 1, end: int = 2> (x) n = Squeeze (l) f = Constant <value_int: int = 0> ()"
        " y = Range (f, n, scalar)", "n", "int64"
    ),
}  # fmt: skip
UNFOLLOWED = {
    "tokens merged with features": ("y = Reshape (x, merged)", "b,n"),
    "a zero that means zero": ("y = Reshape <allowzero: int = 1> (x, heads)", "n,k,2,3"),
    "tokens as the width of a product": (
        "t = Transpose <perm: ints = [0, 2, 1]> (x) q = Gather (table, at) y = MatMul (t, q)", "b,6,6"
    ),
    "the best rows": ("y, at_ = TopK <axis: int = 1> (x, two)", "b,2,6"),
    "tokens against tokens": ("t = Transpose <perm: ints = [0, 2, 1]> (x) y = MatMul (x, t)", "b,s,s"),
    "turned before a product": ("f = Squeeze (x, zero) y = Gemm <transA: int = 1> (f, f)", "6,6"),
    "some rows": ("y = Slice (x, one, far, one)", "b,n,6"),
    "every other row": ("y = Slice (x, zero, far, one, two)", "b,n,6"),
    "the first two rows": ("y = Slice (x, zero, two, one)", "b,2,6"),
    "two rows": ("y = Gather <axis: int = 1> (x, pair)", "b,2,6"),
    "as many rows as a table has": ("y = Add (x, fixed)", "b,n,6"),
    "rows put before rows": ("y = Concat <axis: int = 1> (x, x)", "b,n,6"),
    "rows parted": ("z, y = Split <axis: int = 1, num_outputs: int = 2> (x)", "b,n,6"),
    "rows by a length": (
        "l = Shape <start: int = 1, end: int = 2> (x) y = Slice (x, zero, l, one)", "b,n,6"
    ),
    "an operator nobody knows": ("y = CumSum (x, scalar)", "b,s,6"),
    "what follows": ("u = CumSum (x, scalar) y = Neg (u)", "b,s,6"),
    "a branch that reads tokens unseen": (
        "y = If (c) <then_branch = g () => (float[b,s,6] p) { p = Neg (x) },"
        " else_branch = g () => (float[b,s,6] q) { q = Abs (x) }>", "b,s,6"
    ),
    "keys an attention shows": (
        "z, y = Attention (h, h, h, , past, past)", "b,2,n,3"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FOLLOWED)
def test_a_token_axis_is_followed(what: str) -> None:
    body, shape, axes, *dtype = FOLLOWED[what]
    assert labelled(body, f"{dtype[0] if dtype else 'float'}[{shape}] y") == axes


@pytest.mark.parametrize("what", LENGTHS)
def test_a_length_is_known_as_one(what: str) -> None:
    body, shape, dtype = LENGTHS[what]
    assert labelled(body, f"{dtype}[{shape}] y" if shape else f"{dtype} y") == COUNTED


@pytest.mark.parametrize("what", UNFOLLOWED)
def test_what_cannot_be_followed_is_never_guessed(what: str) -> None:
    body, shape = UNFOLLOWED[what]
    assert labelled(body, f"float[{shape}] y") == LOST


def test_no_shapes_no_guess() -> None:
    text = """<ir_version: 11, opset_import: ["": 24]>
        g (float[b,s,6] x, u) => (y, z, v) { y = Tanh (x) z = Add (y, x) v = Add (u, x) }"""
    model = ir.from_onnx_text(text)
    labels = label_axes(model.graph, {model.graph.inputs[0]: Axes(1)})
    assert [labels[value] for value in model.graph.outputs] == [Axes(1), Axes(1), LOST]


# --- seeds ---


def test_inputs_are_told_by_the_symbols_of_their_shapes() -> None:
    text = """<ir_version: 11, opset_import: ["": 24]>
        g (float[n,tokens,4] inputs_embeds, int64[n,all] attention_mask, int64[3,n,tokens] position_ids,
           float[n,tokens,2] cos, float[n,1,tokens,all] bias, float[n,2,old,4] past, float[4,4] w)
        => (float[n,tokens,4] y) { y = MatMul (inputs_embeds, w) }"""
    seeds = token_seeds(ir.from_onnx_text(text).graph)
    assert {value.name: axes for value, axes in seeds.items()} == {
        "inputs_embeds": Axes(1),
        "attention_mask": Axes(key=1),
        "position_ids": Axes(2),
        "cos": Axes(1),
        "bias": Axes(2, 3),
    }


def test_inputs_of_fixed_shape_are_told_by_name() -> None:
    text = """<ir_version: 11, opset_import: ["": 24]>
        g (float[1,7,4] inputs_embeds, int64[1,7] attention_mask, int64[3,1,7] position_ids, float[7] w)
        => (float[1,7,4] y) { y = Abs (inputs_embeds) }"""
    seeds = token_seeds(ir.from_onnx_text(text).graph)
    named = {value.name: axes for value, axes in seeds.items()}
    assert named == {"inputs_embeds": Axes(1), "position_ids": Axes(2)}


# --- layers and sites ---


@dataclass(frozen=True)
class Found:
    """An analysis, in names."""

    layers: tuple[tuple[str | None, ...], ...]
    sites: tuple[tuple[object, ...], ...]


def analysed(model: ir.Model, schedule: Resolved, names: Mapping[str, str]) -> Found:
    """Layers and sites of ``model``, whose values are called ``names``."""

    def name(value: ir.Value) -> str | None:
        return names.get(value.name or "", value.name)

    labels = label_axes(model.graph, token_seeds(model.graph))
    layers = find_layers(model.graph, labels)
    return Found(
        tuple(
            (*(name(v) for v in (it.entry, it.query, it.key, it.past_key, it.keys, it.mask)),)
            for it in layers
        ),
        tuple(
            (
                site.cut.before_layer,
                site.scored.index,
                name(site.entry),
                frozenset((name(stream.value), stream.axis) for stream in site.streams),
                frozenset(name(mask) for mask in site.masks),
                frozenset(name(value) for node in site.after for value in node.outputs),
            )
            for site in find_sites(layers, labels, schedule)
        ),
    )


def test_layers_and_what_a_cut_crosses() -> None:
    found = analysed(before("two_cuts"), resolved("two_cuts"), {})
    assert [layer[:1] + layer[2:] for layer in found.layers] == [
        (entry, f"key_{n}", f"past_key_values.{n}.key", f"present.{n}.key", "mask")
        for n, entry in enumerate(("inputs_embeds", "hidden_1", "hidden_2"))
    ]
    tables = frozenset({("cos", 1), ("sin", 1)})
    assert [site[:5] for site in found.sites] == [
        (n, n - 1, f"hidden_{n}", tables, frozenset({"mask"})) for n in (1, 2)
    ]
    assert "attended_1" in found.sites[0][5]  # type: ignore[operator]
    assert not {"attended_0", "attended_1"} & found.sites[1][5]  # type: ignore[operator]


def test_the_source_and_the_point_of_a_cut() -> None:
    inside = analysed(before("inside"), resolved("inside"), {}).sites[0]
    assert inside[1:3] == (0, "mixed_0")
    assert inside[3] == {("inputs_embeds", 1), ("cos", 1), ("sin", 1)}
    halfway = analysed(before("attended"), resolved("attended"), {}).sites[0]
    assert halfway[1:3] == (0, "attended_0")
    assert halfway[3] == {("cos", 1), ("sin", 1)}
    first = analysed(before("from_next_first"), resolved("from_next_first"), {}).sites
    assert [site[1:3] for site in first] == [(0, "inputs_embeds"), (1, "hidden_1")]
    wide = analysed(before("wide_tables"), resolved("wide_tables"), {}).sites[0]
    assert wide[3] == {("cos", 2), ("sin", 2)}


def test_a_scale_is_that_of_the_attention_or_follows_from_its_width() -> None:
    text = (GRAPHS / "from_previous" / "before.onnxtxt").read_text(encoding="utf-8")
    text = text.replace("heads_1 = Attention (", "heads_1 = Attention <scale: float = 0.25> (")
    model = read(text)
    layers = find_layers(model.graph, label_axes(model.graph, token_seeds(model.graph)))
    assert [layer.scale for layer in layers] == [pytest.approx(2**-0.5), 0.25]


def shuffled(model: ir.Model, draw: random.Random) -> None:
    """Another topological order, drawn node by node."""
    done: set[ir.Value | None] = {None, *model.graph.inputs, *model.graph.initializers.values()}
    waiting, order = list(model.graph), []
    while waiting:
        ready = [node for node in waiting if done.issuperset(node.inputs)]
        node = draw.choice(ready)
        waiting.remove(node)
        done |= set(node.outputs)
        order.append(node)
    model.graph.remove(order)
    model.graph.extend(order)


def renamed(model: ir.Model, draw: random.Random) -> dict[str, str]:
    """Give every value that is no input another name; new name → old name."""
    values = [value for node in model.graph for value in node.outputs]
    numbers = draw.sample(range(1000), len(values))
    names = {f"v{n}": value.name or "" for n, value in zip(numbers, values, strict=True)}
    for n, value in zip(numbers, values, strict=True):
        value.name = f"v{n}"
    for node in model.graph:
        node.name = f"node {draw.random()}"
    return names


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=5)
@given(st.randoms(use_true_random=False))
def test_neither_names_nor_the_order_of_nodes_matter(case: str, draw: random.Random) -> None:
    schedule, model = resolved(case), before(case)
    expected = analysed(model, schedule, {})
    shuffled(model, draw)
    names = renamed(model, draw)
    assert analysed(model, schedule, names) == expected


# --- graphs with cuts ---


@pytest.mark.parametrize("case", CASES)
def test_a_graph_with_cuts_has_the_layers_it_had(case: str) -> None:
    schedule = resolved(case)
    model = ir.from_proto(ir.to_proto(cut(before(case), schedule)))  # as a file has it
    labels = label_axes(model.graph, token_seeds(model.graph))
    layers = find_layers(model.graph, labels)
    assert len(layers) == schedule.layers
    past = [layer.past_key.name for layer in layers]
    assert past == [f"past_key_values.{n}.key" for n in range(schedule.layers)]
    stages = [sum(item.before_layer <= n for item in schedule.cuts) for n in range(schedule.layers)]
    masks = ["mask", *(f"cut.{item.before_layer}.mask" for item in schedule.cuts)]
    assert [layer.mask.name for layer in layers] == [masks[stage] for stage in stages]
    assert not [v.name for v, axes in labels.items() if axes.state == OPAQUE]


# --- small helpers ---


def test_what_lies_before_and_behind_a_value() -> None:
    body = "a = Abs (x) b = Neg (a) c = Tanh (a) y = Add (b, c) z = Neg (x)"
    model = graph("(float[2] x) => (float[2] y, float[2] z)", body)
    by_name = {value.name: value for node in model.graph for value in node.outputs}

    def made(nodes: set[ir.Node]) -> set[str | None]:
        return {node.outputs[0].name for node in nodes}

    assert made(ancestors([by_name["c"]])) == {"a", "c"}
    assert made(ancestors([by_name["y"]], by_name["a"].producer())) == {"b", "c", "y"}
    assert made(descendants(by_name["a"])) == {"b", "c", "y"}
    only = {node for node in model.graph if node.op_type != "Tanh"}
    assert made(descendants(by_name["a"], only)) == {"b", "y"}


def test_another_number_of_layers_is_refused() -> None:
    model = before("two_cuts")
    labels = label_axes(model.graph, token_seeds(model.graph))
    layers: list[Layer] = find_layers(model.graph, labels)
    with pytest.raises(AnalysisError, match="3 attention layers, the model 4"):
        find_sites(layers, labels, Resolved(4, None, (Cut(1, Keep(1, 2)),)))


def test_a_graph_without_embeddings_is_no_decoder() -> None:
    model = graph("(float[b,s,4] x) => (float[b,s,4] y)", "y = Neg (x)")
    with pytest.raises(AnalysisError, match="inputs_embeds"):
        find_layers(model.graph, {})
