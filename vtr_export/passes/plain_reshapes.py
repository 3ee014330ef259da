"""Say plainly what a computed Reshape or Expand does, where inferred shapes show it."""

from collections.abc import Sequence

import onnx_ir as ir


class PlainReshapes(ir.passes.InPlacePass):
    """Reshapes that only add or drop axes of one entry, and expansions by numbers.

    Before::

        Reshape(x: [1,3,batch,sequence], computed): [3,batch,sequence]
        Expand(y: [batch,1,sequence], computed): [batch,4,sequence]

    After::

        Squeeze(x, [0])
        Expand(y, [1, 4, 1])

    A symbol in a shape counts the same wherever it stands.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Each by the shapes before and after it."""
        found = 0
        for node in list(model.graph):
            if node.domain == "" and node.op_type in ("Reshape", "Expand"):
                found += _rewrite(model.graph, node)
        return ir.passes.PassResult(model, modified=bool(found))


def _rewrite(graph: ir.Graph, node: ir.Node) -> bool:
    value, output = node.inputs[0], node.outputs[0]
    if value is None or value.shape is None or output.shape is None or _is_constant(node.inputs[1]):
        return False
    before, after = [str(dim) for dim in value.shape], [str(dim) for dim in output.shape]
    if "None" in before or "None" in after:
        return False
    if node.op_type == "Expand":
        return _expand(graph, node, before, after)
    if [dim for dim in before if dim != "1"] != [dim for dim in after if dim != "1"]:
        return False
    steps = [
        ("Squeeze", [axis for axis, dim in enumerate(before) if dim == "1"]),
        ("Unsqueeze", [axis for axis, dim in enumerate(after) if dim == "1"]),
    ]
    _replace(graph, node, value, steps)
    return True


def _expand(graph: ir.Graph, node: ir.Node, before: Sequence[str], after: Sequence[str]) -> bool:
    """1 where a dimension stays, a number where one entry becomes several."""
    wide = ["1"] * (len(after) - len(before)) + list(before)
    kept = [old == new for old, new in zip(wide, after, strict=True)]
    if not all(same or new.isdecimal() for same, new in zip(kept, after, strict=True)):
        return False
    target = [1 if same else int(new) for same, new in zip(kept, after, strict=True)]
    axes = ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", target)])
    axes.outputs[0].name = f"{node.outputs[0].name}.shape"
    graph.insert_before(node, axes)
    node.replace_input_with(1, axes.outputs[0])
    return True


def _replace(
    graph: ir.Graph, node: ir.Node, value: ir.Value, steps: Sequence[tuple[str, list[int]]]
) -> None:
    old, last = node.outputs[0], value
    for op_type, places in steps:
        if not places:
            continue
        axes = ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", places)])
        axes.outputs[0].name = f"{old.name}.{op_type}.axes"
        made = ir.Node("", op_type, [last, axes.outputs[0]])
        last = made.outputs[0]
        last.name, last.type = f"{old.name}.{op_type}", old.type
        graph.insert_before(node, [axes, made])
    if last is value:
        made = ir.Node("", "Identity", [value])
        last = made.outputs[0]
        graph.insert_before(node, made)
    last.name, last.shape, last.type, old.name = old.name, old.shape, old.type, None
    old.replace_all_uses_with(last, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and ir.convenience.get_const_tensor(value) is not None
