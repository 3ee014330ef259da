"""Ask for the one dimension that is read, not for all."""

from collections.abc import Sequence

import onnx_ir as ir

from vtr_export.analysis.axes import rank


class NarrowShapes(ir.passes.InPlacePass):
    """Let a length be told from a batch size: they are read one by one.

    Before::

        size = Gather(Shape(x), 0)

    After::

        size = Squeeze(Shape<start = 0, end = 1>(x))
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Every Gather and Slice of a Shape by constants."""
        found = 0
        for node in list(model.graph):
            place = _place(node)
            if place is not None:
                _rewrite(model.graph, node, *place)
                found += 1
        return ir.passes.PassResult(model, modified=bool(found))


def _place(node: ir.Node) -> tuple[int, int, bool] | None:
    """First and last dimension that is read, and whether it becomes a number."""
    if node.domain != "" or node.op_type not in ("Gather", "Slice") or not node.inputs[0]:
        return None
    shape = node.inputs[0].producer()
    if shape is None or shape.op_type != "Shape" or shape.domain != "" or shape.attributes:
        return None
    own = rank(shape.inputs[0])
    bounds = [_constant(value) for value in node.inputs[1:]]
    if own is None or any(bound is None for bound in bounds):
        return None
    numbers = [bound for bound in bounds if bound is not None]
    if node.op_type == "Gather":
        if len(numbers[0]) != 1:
            return None
        at = numbers[0][0] % own
        return at, at + 1, rank(node.inputs[1]) == 0
    if len(numbers) > 3 and numbers[3] != [1]:
        return None
    asked = range(own)[slice(numbers[0][0], numbers[1][0])]
    return (asked.start, asked.stop, False) if asked else None


def _constant(value: ir.Value | None) -> Sequence[int] | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return [int(entry) for entry in tensor.numpy().reshape(-1)] if tensor is not None else None


def _rewrite(graph: ir.Graph, node: ir.Node, start: int, end: int, is_number: bool) -> None:
    shape, old = node.inputs[0], node.outputs[0]
    assert shape is not None
    producer = shape.producer()
    assert producer is not None
    bounds = [ir.AttrInt64("start", start), ir.AttrInt64("end", end)]
    nodes = [ir.Node("", "Shape", producer.inputs, bounds)]
    if is_number:
        nodes[0].outputs[0].name = f"{old.name}.dim"
        nodes.append(ir.Node("", "Squeeze", [nodes[0].outputs[0]]))
    new = nodes[-1].outputs[0]
    new.type, new.shape, new.name = old.type, old.shape, old.name
    old.name = None
    graph.insert_before(node, nodes)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
