"""Random decoders of which one part cannot be narrowed: each must be refused, whatever is around."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx_ir as ir
from decoder_writer import FAR, Builder
from onnx_ir.passes.common import ShapeInferencePass
from random_decoders import Decoder, Random

Tables = tuple[ir.Value, ir.Value] | None


class Losing(Builder):
    """Writes one part of layer ``at`` in a way that loses the axis of tokens."""

    def __init__(self, decoder: Decoder, weights: Random, kind: str, at: int) -> None:
        super().__init__(decoder, weights)
        self.kind, self.at = kind, at

    def _layer(self, index: int, hidden: ir.Value, mask: ir.Value, tables: Tables) -> ir.Value:
        if index == self.at and self.kind in STREAMS:
            hidden = STREAMS[self.kind](self, hidden)
        if index == self.at and self.kind in MASKS:
            mask = MASKS[self.kind](self, mask)
        made = len(self.pen.nodes)
        hidden = super()._layer(index, hidden, mask, tables)
        if index == self.at and self.kind in ATTENTIONS:
            found = [node for node in self.pen.nodes[made:] if node.op_type == "Attention"]
            ATTENTIONS[self.kind](self, found[0])
        if index == self.at and self.kind in ROWS:
            hidden = ROWS[self.kind](self, hidden)
        return hidden

    def spare(self, name: str, shape: tuple[int | str, ...]) -> ir.Value:
        """One more input."""
        return self._input(name, shape)


def folded(it: Losing, hidden: ir.Value) -> ir.Value:
    flat = it.pen.op("Reshape", hidden, it.pen.ints(0, -1))
    return it.pen.op("Reshape", flat, it.pen.ints(0, -1, it.it.width))


def batch_folded(it: Losing, hidden: ir.Value) -> ir.Value:
    flat = it.pen.op("Tanh", it.pen.op("Reshape", hidden, it.pen.ints(-1, it.it.width)))
    return it.pen.op("Reshape", flat, it.pen.op("Shape", hidden))


def shifted(it: Losing, hidden: ir.Value) -> ir.Value:
    """Each token gets its left neighbour."""
    first, rest = it.pen.slice(hidden, 0, 1, axis=1), it.pen.slice(hidden, 0, -1, axis=1)
    return it.pen.op("Add", hidden, it.pen.op("Concat", first, rest, axis=1))


def summed(it: Losing, hidden: ir.Value) -> ir.Value:
    single = it.pen.op("Cast", hidden, to=ir.DataType.FLOAT)
    total = it.pen.op("CumSum", single, it.pen.ints(1, scalar=True))
    return it.pen.op("Add", hidden, it.pen.op("Cast", total, to=it.float))


def convolved(it: Losing, hidden: ir.Value) -> ir.Value:
    width = it.it.width
    kernel = it.pen.weight(("kernel", (width, width, 3)))
    turned = it.pen.op("Transpose", hidden, perm=[0, 2, 1])
    mixed = it.pen.op("Conv", turned, kernel, pads=[1, 1])
    return it.pen.op("Transpose", mixed, perm=[0, 2, 1])


def as_many_as_a_table(it: Losing, hidden: ir.Value) -> ir.Value:
    return it.pen.op("Add", hidden, it.pen.weight(("table", (1, 9, it.it.width))))


def counted(it: Losing, hidden: ir.Value) -> ir.Value:
    """Something for each place, from the length alone."""
    pen = it.pen
    length = pen.op("Squeeze", pen.op("Shape", hidden, start=1, end=2))
    places = pen.op("Range", pen.ints(0, scalar=True), length, pen.ints(1, scalar=True))
    column = pen.op("Cast", pen.op("Unsqueeze", places, pen.ints(1)), to=it.float)
    return pen.op("Add", hidden, column)


def unknown(it: Losing, hidden: ir.Value) -> ir.Value:
    return it.pen.op("Mixer", hidden, domain="some.house")


def turned_round(it: Losing, hidden: ir.Value) -> ir.Value:
    return it.pen.slice(hidden, -1, -FAR, axis=1, step=-1)


def scattered(it: Losing, hidden: ir.Value) -> ir.Value:
    return it.pen.op("ScatterND", hidden, it.pen.op("NonZero", hidden), hidden)


def attended_otherwise(it: Losing, hidden: ir.Value) -> ir.Value:
    """Tokens mixed by products that no attention is recognised in."""
    pen = it.pen
    odds = pen.op("MatMul", hidden, pen.op("Transpose", hidden, perm=[0, 2, 1]))
    return pen.op("MatMul", pen.op("Tanh", odds), hidden)


def branched(it: Losing, hidden: ir.Value) -> ir.Value:
    """A branch reads the stream unseen."""
    branches = {}
    for name, op_type in (("then_branch", "Neg"), ("else_branch", "Abs")):
        node = ir.node(op_type, [hidden])
        node.outputs[0].name = f"{name}_made"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(it.float), hidden.shape
        branches[name] = ir.Graph([], node.outputs, nodes=[node], name=name)
    condition = it.pen.op("Cast", it.pen.ints(1), to=ir.DataType.BOOL)
    return it.pen.op("If", condition, **branches)


STREAMS: dict[str, Callable[[Losing, ir.Value], ir.Value]] = {
    each.__name__: each
    for each in (
        folded, batch_folded, shifted, summed, convolved, as_many_as_a_table, counted, unknown,
        turned_round, scattered, attended_otherwise, branched,
    )
}  # fmt: skip


def own_mask(it: Losing, mask: ir.Value) -> ir.Value:
    """Every second key, seen by another mask than the decoder's."""
    seen = it.spare("seen", ("batch", 1, "sequence", "total"))
    return it.pen.op("And", mask, it.pen.op("Cast", seen, to=ir.DataType.BOOL))


def turned_mask(it: Losing, mask: ir.Value) -> ir.Value:
    return it.pen.op("Not", mask)


MASKS: dict[str, Callable[[Losing, ir.Value], ir.Value]] = {
    each.__name__: each for each in (own_mask, turned_mask)
}


def without_batch(it: Losing, hidden: ir.Value) -> ir.Value:
    return it.pen.op("Mul", hidden, it.spare("places", ("sequence", 1)))


def one_for_all_rows(it: Losing, hidden: ir.Value) -> ir.Value:
    return it.pen.op("Mul", hidden, it.spare("places", (1, "sequence", 1)))


def planes_at_once(it: Losing, hidden: ir.Value) -> ir.Value:
    """A stream whose first axis is not the batch's."""
    pen, planes = it.pen, it.spare("planes", (3, "batch", "sequence", it.it.width))
    added = pen.op("Add", pen.op("Unsqueeze", hidden, pen.ints(0)), planes)
    return pen.op("ReduceSum", added, pen.ints(0), keepdims=0)


ROWS: dict[str, Callable[[Losing, ir.Value], ir.Value]] = {
    each.__name__: each for each in (without_batch, one_for_all_rows, planes_at_once)
}


def keys_of_an_earlier_layer(it: Losing, node: ir.Node) -> None:
    earlier = next(each for each in it.pen.nodes if each.op_type == "Attention")
    for index in (1, 2):
        node.replace_input_with(index, earlier.inputs[index])


def new_keys_first(it: Losing, node: ir.Node) -> None:
    concat: Any = node.inputs[1]
    past, new = concat.producer().inputs
    concat.producer().replace_input_with(0, new)
    concat.producer().replace_input_with(1, past)


def causal_by_itself(it: Losing, node: ir.Node) -> None:
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def unmasked(it: Losing, node: ir.Node) -> None:
    node.replace_input_with(3, None)


ATTENTIONS: dict[str, Callable[[Losing, ir.Node], None]] = {
    each.__name__: each
    for each in (
        keys_of_an_earlier_layer, new_keys_first, causal_by_itself, unmasked,
    )
}  # fmt: skip

KINDS = (*STREAMS, *MASKS, *ROWS, *ATTENTIONS)


def losing(decoder: Decoder, seed: int, kind: str, at: int) -> ir.Model:
    """``decoder``, with ``kind`` in layer ``at``."""
    decoder = replace(decoder, stand_in=False)
    model = Losing(decoder, Random(seed, decoder.dtype), kind, at).model()
    model.graph.opset_imports["some.house"] = 1
    ShapeInferencePass()(model)
    return model
