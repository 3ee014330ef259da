"""Give every cross-attention of a decoder its mask: the vision keys that a row sees."""

import onnx_ir as ir

from vtr_export import ops
from vtr_export.errors import AnalysisError


class AttachCross(ir.passes.InPlacePass):
    """Replace the stand-in inputs ``cross`` and ``rows`` by what follows from ``cross_mask``.

    Before::

        Attention(query, keys, values, cross)
        Mul(Unsqueeze(rows), mlp)

    After::

        Attention(query, keys, values, vtr.VtrCrossMask(past_mask.cross, cross_mask))
        Mul(Unsqueeze(Cast(vtr.VtrCrossRows(past_mask.cross, cross_mask, cross_rows))), mlp)
        present_mask.cross = Concat(past_mask.cross, Cast(cross_mask[:, -1]))
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Swap the inputs and every use of the stand-ins."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        if "cross" not in inputs:
            return ir.passes.PassResult(model, modified=False)
        _check(inputs["cross"])
        seen = ir.val("cross_mask", ir.DataType.BOOL, ["batch", "sequence", "vision"])
        past = ir.val("past_mask.cross", ir.DataType.INT64, ["batch", "cross_past"])
        mask = _call(model, ops.CROSS, [past, seen], "mask.cross")
        mask.outputs[0].shape = ir.Shape(["batch", 1, "sequence", "cross_total"])
        mask.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
        nodes = [mask, *_present(graph, past, seen)]
        graph.inputs[graph.inputs.index(inputs["cross"])] = seen
        inputs["cross"].replace_all_uses_with(mask.outputs[0])
        nodes += _rows(model, inputs["rows"], past, seen)
        graph.inputs.append(past)
        graph.insert_before(graph[0], nodes)
        return ir.passes.PassResult(model, modified=True)


def _check(stand_in: ir.Value) -> None:
    for node, index in stand_in.uses():
        if (node.domain, node.op_type, index) != ("", "Attention", 3):
            raise AnalysisError(
                f"the cross mask is read by {node.name!r} ({node.op_type}), which is no attention",
                hint="report the model: its decoder cannot be exported yet",
            )


def _present(graph: ir.Graph, past: ir.Value, seen: ir.Value) -> list[ir.Node]:
    """What a later call is given: the keys that this one's last row sees."""
    last = ir.Node("", "Constant", [], [ir.AttrInt64("value_int", -1)])
    last.outputs[0].name = "cross.last"
    row = ir.Node("", "Gather", [seen, last.outputs[0]], [ir.AttrInt64("axis", 1)])
    row.outputs[0].name = "cross.row"
    current = ir.Node("", "Cast", [row.outputs[0]], [ir.AttrInt64("to", ir.DataType.INT64)])
    current.outputs[0].name = "cross.current"
    both = ir.Node("", "Concat", [past, current.outputs[0]], [ir.AttrInt64("axis", 1)])
    present = both.outputs[0]
    present.name, present.shape = "present_mask.cross", ir.Shape(["batch", "cross_total"])
    present.type = ir.TensorType(ir.DataType.INT64)
    graph.outputs.append(present)
    return [last, row, current, both]


def _rows(model: ir.Model, rows: ir.Value, past: ir.Value, seen: ir.Value) -> list[ir.Node]:
    """Those that count, where the family asks for them."""
    graph = model.graph
    place = graph.inputs.index(rows)
    if not rows.uses():
        del graph.inputs[place]
        return []
    own = ir.val("cross_rows", ir.DataType.INT64, ["batch", "sequence"])
    graph.inputs[place] = own
    counted = _call(model, ops.CROSS_ROWS, [past, seen, own], "rows.cross")
    assert rows.dtype is not None
    cast = ir.Node("", "Cast", [counted.outputs[0]], [ir.AttrInt64("to", rows.dtype)])
    cast.outputs[0].name, cast.outputs[0].type = "rows.cross.cast", rows.type
    cast.outputs[0].shape = rows.shape
    rows.replace_all_uses_with(cast.outputs[0])
    return [counted, cast]


def _call(model: ir.Model, operator: str, inputs: list[ir.Value], name: str) -> ir.Node:
    ops.declare(model, operator)
    node = ir.Node(ops.DOMAIN, operator, inputs)
    node.outputs[0].name = name
    return node
