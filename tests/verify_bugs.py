"""Bugs to plant in an artifact's graphs: each is one that an exporter could really make."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Bug = Callable[[ir.Model], None]
DECODER = "decoder_model_merged"
_numbers = itertools.count()


def _op(place: Any, before: ir.Node, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
    """One more node in ``place`` (a graph or a function)."""
    node = ir.node(op, inputs, attributes)
    node.outputs[0].name = f"bug.{next(_numbers)}"
    place.insert_before(before, node)
    return node.outputs[0]


def _ints(place: Any, before: ir.Node, *values: int) -> ir.Value:
    return _op(place, before, "Constant", value_ints=list(values))


def _function(model: ir.Model, name: str) -> ir.Function:
    return model.functions[("vtr", name, "")]


def _only(nodes: Any, op: str) -> ir.Node:
    (found,) = [node for node in nodes if node.op_type == op]
    return found


def _sites(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention"]


def _cuts(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "VtrTopKPrune"]


def _producer(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node


def scaled(name: str, factor: float) -> Bug:
    """A weight that is not the checkpoint's."""

    def plant(model: ir.Model) -> None:
        (weight,) = [v for v in model.graph.initializers.values() if (v.name or "").endswith(name)]
        assert weight.const_value is not None
        changed = (weight.const_value.numpy() * factor).astype(np.float32)
        weight.const_value = ir.tensor(changed, name=weight.name)

    return plant


def rotates_the_other_way(layer: int) -> Bug:
    def plant(model: ir.Model) -> None:
        site = _sites(model)[layer]
        new_keys = _producer(site.inputs[1]).inputs[1]
        for rotary in (_producer(site.inputs[0]), _producer(new_keys)):
            assert rotary.op_type == "RotaryEmbedding"
            sin = rotary.inputs[2]
            assert sin is not None
            rotary.replace_input_with(2, _op(model.graph, rotary, "Neg", sin))

    return plant


def decode_misses_the_newest_key(model: ir.Model) -> None:
    """A row of a continued call sees the keys before the one before it."""
    mask = _function(model, "VtrCausalMask")
    less = _only(mask, "Less")
    (past,) = [node.outputs[0] for node in mask if node.op_type == "Sub"]
    one = _ints(mask, less, 1)
    rows = less.inputs[1]
    assert rows is not None
    shift = _op(mask, less, "Min", past, one)
    less.replace_input_with(1, _op(mask, less, "Sub", rows, shift))


def padding_is_seen(model: ir.Model) -> None:
    """Masks are causal and nothing else."""
    mask = _function(model, "VtrCausalMask")
    both = _only(mask, "And")
    real = both.inputs[1]
    assert real is not None
    pads = _op(mask, both, "Not", real)
    both.replace_input_with(1, _op(mask, both, "Or", real, pads))


def leaves_the_range_of_fp16(layer: int) -> Bug:
    """What the MLP gates is multiplied and divided by a number that is too large."""

    def plant(model: ir.Model) -> None:
        name = f"layers.{layer}.mlp.down_proj.weight"
        (down,) = [
            use.node
            for value in model.graph.initializers.values()
            if (value.name or "").endswith(name)
            for use in value.uses()
        ]
        wide = down.inputs[0]
        assert wide is not None
        half = {"dtype": ir.DataType.FLOAT16}
        for op in ("Mul", "Div"):
            factor = _op(model.graph, down, "Constant", value=ir.tensor([60000.0], **half))
            wide = _op(model.graph, down, op, wide, factor)
        down.replace_input_with(0, wide)

    return plant


def scores_in_half_precision(model: ir.Model) -> None:
    score = _function(model, "VtrScore")
    softmax = _only(score, "Softmax")
    probability = softmax.outputs[0]
    readers = list(probability.uses())
    half = _op(score, readers[0].node, "Cast", probability, to=ir.DataType.FLOAT16)
    single = _op(score, readers[0].node, "Cast", half, to=ir.DataType.FLOAT)
    for use in readers:
        use.node.replace_input_with(use.idx, single)


def keeps_the_worst(model: ir.Model) -> None:
    _only(_function(model, "VtrRankJoint"), "TopK").attributes["largest"] = ir.AttrInt64(
        "largest", 0
    )


def ties_go_to_the_higher_index(model: ir.Model) -> None:
    rank = _function(model, "VtrRankJoint")
    top = _only(rank, "TopK")
    score, order = top.inputs[0], top.outputs[1]
    assert score is not None
    first, last = _ints(rank, top, -1), _ints(rank, top, -(2**62))
    back = _op(rank, top, "Slice", score, first, last, _ints(rank, top, 1), first)
    top.replace_input_with(0, back)
    readers = list(order.uses())
    after = readers[0].node
    count = _op(rank, after, "Shape", score, start=1, end=2)
    highest = _op(rank, after, "Sub", count, _ints(rank, after, 1))
    forth = _op(rank, after, "Sub", highest, order)
    for use in readers:
        use.node.replace_input_with(use.idx, forth)


def the_second_budget_is_the_first(model: ir.Model) -> None:
    first, second = ([_producer(cut.inputs[4]), _producer(cut.inputs[5])] for cut in _cuts(model))
    for mine, other in zip(first, second, strict=True):
        other.replace_input_with(1, mine.inputs[1])


def budgets_are_swapped(model: ir.Model) -> None:
    """Each of two cuts keeps what the schedule says of the other."""
    first, second = ([_producer(cut.inputs[4]), _producer(cut.inputs[5])] for cut in _cuts(model))
    for mine, other in zip(first, second, strict=True):
        keep, others = mine.inputs[1], other.inputs[1]
        mine.replace_input_with(1, others)
        other.replace_input_with(1, keep)
    model.graph.sort()


def keep_sets_are_swapped(model: ir.Model) -> None:
    """``kept.0`` is what the second cut keeps."""
    first, second = (cut.outputs[1] for cut in _cuts(model))
    first.name = "kept.swapped"
    second.name = "kept.0"
    first.name = "kept.1"


def positions_are_those_of_the_neighbours(model: ir.Model) -> None:
    """The first cut gathers cos and sin one column early."""
    kept = _cuts(model)[0].outputs[1]
    narrows = [
        use.node
        for use in kept.uses()
        if use.node.op_type == "VtrNarrow" and _is_rotary(use.node.outputs[0])
    ]
    assert len(narrows) == 2
    for node in narrows:
        early = _op(model.graph, node, "Sub", kept, _ints(model.graph, node, 1))
        zero = _ints(model.graph, node, 0)
        node.replace_input_with(1, _op(model.graph, node, "Max", early, zero))


def _is_rotary(value: ir.Value) -> bool:
    return any(use.node.op_type == "RotaryEmbedding" for use in value.uses())


def a_stage_forgets_a_column(model: ir.Model) -> None:
    """The padding that the first cut hands on is one column short."""
    graph, name = model.graph, "present_mask.0"
    (at,) = [i for i, value in enumerate(graph.outputs) if value.name == name]
    whole = graph.outputs[at]
    last = graph[len(graph) - 1]
    bounds = [_ints(graph, last, number) for number in (0, -1, 1)]
    short = _op(graph, last, "Slice", whole, *bounds)
    short.type, short.shape = whole.type, whole.shape
    whole.name, short.name = "bug.whole", name
    graph.outputs[at] = short
    graph.sort()


def caches_keys_before_they_are_rotated(layer: int) -> Bug:
    def plant(model: ir.Model) -> None:
        graph, name = model.graph, f"present.{layer}.key"
        (at,) = [i for i, value in enumerate(graph.outputs) if value.name == name]
        keys = graph.outputs[at]
        concat = _producer(keys)
        past, rotated = concat.inputs
        assert past is not None
        raw = _producer(rotated).inputs[0]
        assert raw is not None
        cached = _op(graph, concat, "Concat", past, raw, axis=-2)
        cached.type, cached.shape = keys.type, keys.shape
        keys.name, cached.name = "bug.keys", name
        graph.outputs[at] = cached

    return plant


PLANTED: dict[str, tuple[str, Bug, str, Sequence[str]]] = {
    # name: graph, bug, first gate that fails, what its detail says
    "weight": (
        DECODER, scaled("layers.1.mlp.up_proj.weight", 1.002),
        "forced.prefill.difference", ["layer 1 deviates first", "the prefill of single"],
    ),
    "last weight": (
        DECODER, scaled("layers.3.mlp.down_proj.weight", 1.002),
        "forced.prefill.difference", ["layer 3 deviates first"],
    ),
    "head": (
        DECODER, scaled("lm_head.weight", 1.002),
        "forced.prefill.difference", ["every layer agrees", "the head"],
    ),
    "final norm": (
        DECODER, scaled("language_model.norm.weight", 1.002),
        "forced.prefill.difference", ["every layer agrees", "the final norm"],
    ),
    "rope sign": (
        DECODER, rotates_the_other_way(1),
        "forced.prefill.cosine", ["layer 1 deviates first"],
    ),
    "positions": (
        DECODER, positions_are_those_of_the_neighbours,
        "forced.prefill.cosine", ["layer 2 deviates first"],
    ),
    "decode mask": (
        DECODER, decode_misses_the_newest_key,
        "forced.decode.cosine", ["layer 0 deviates first", "decode step 1 of single"],
    ),
    "padding": (
        DECODER, padding_is_seen,
        "forced.prefill.cosine", ["layer 0 deviates first", "the prefill of batch"],
    ),
    "cached keys": (
        DECODER, caches_keys_before_they_are_rotated(2),
        "forced.decode.cosine", ["layer 2 deviates first", "decode step 1 of single"],
    ),
    "past length": (
        DECODER, a_stage_forgets_a_column,
        "forced.runs", [DECODER, "total_sequence_length"],
    ),
    "fp16 scores": (
        DECODER, scores_in_half_precision,
        "scores.cut.0", ["before layer 2"],
    ),
    "worst tokens": (
        DECODER, keeps_the_worst,
        "keep_sets.cut.0", ["before layer 2"],
    ),
    "ties": (
        DECODER, ties_go_to_the_higher_index,
        "keep_sets.ties", ["before layer 2"],
    ),
    "budget": (
        DECODER, the_second_budget_is_the_first,
        "keep_sets.counts", ["before layer 3 keeps 9 vision tokens, not 4"],
    ),
    "swapped budgets": (
        DECODER, budgets_are_swapped,
        "free.runs", [DECODER, "TopK"],
    ),
    "cut indices": (
        DECODER, keep_sets_are_swapped,
        "forced.runs", [DECODER],
    ),
    "vision tower": (
        "vision_encoder", scaled("encoder.layers.0.mlp.fc1.weight", 1.05),
        "vision_encoder.cosine", [],
    ),
    "embedding": (
        "embed_tokens", scaled("embed_tokens.weight", 1 + 1e-6),
        "embed_tokens.differences", [],
    ),
}  # fmt: skip
