"""Make reshapes say what they keep instead of computing it from another tensor's shape."""

import numpy as np
import onnx_ir as ir


class FixReshapes(ir.passes.InPlacePass):
    """Replace a computed target shape by a constant, so that no length crosses a cut as a number.

    Before::

        Reshape(x: [batch, sequence, 32], Concat(Shape(…), Shape(…), [4, 8]))

    After::

        Reshape(x, [0, 0, 4, 8])

    An Expand to the shape that its input has goes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every Reshape whose symbolic shapes leave at most one dimension open."""
        plans = []
        idle = [(node, same) for node in model.graph if (same := _unchanged(node)) is not None]
        for node in model.graph:
            if node.op_type == "Reshape" and node.domain == "":
                target = constant_target(node)
                if target is not None and not _is_constant(node.inputs[1]):
                    plans.append((node, target))
        for node, target in plans:
            _set_target(model.graph, node, target, f"{node.outputs[0].name}.shape")
        for node, entering in idle:
            node.outputs[0].replace_all_uses_with(entering, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=bool(plans or idle))


def constant_target(node: ir.Node) -> list[int] | None:
    """The target with 0 for kept and -1 for one open dimension; None if two stay open."""
    before, after = node.inputs[0], node.outputs[0]
    if before is None or before.shape is None or after.shape is None:
        return None
    target: list[int] = []
    for axis, dim in enumerate(after.shape):
        if isinstance(dim, int):
            target.append(dim)
        elif _kept(before.shape, dim, axis):
            target.append(0)
        else:
            target.append(-1)
    is_empty = any(dim == 0 for dim in after.shape)  # a target cannot say so
    return None if is_empty or target.count(-1) > 1 else _led(target, before.shape, after.shape)


def _led(target: list[int], before: ir.Shape, after: ir.Shape) -> list[int]:
    """Numbers in front of a kept dimension are kept, too, where they are the same on both sides."""
    last = max((axis for axis, dim in enumerate(target) if dim == 0), default=0)
    same = all(
        str(one) == str(other) for one, other in zip(before[:last], after[:last], strict=False)
    )
    return [0] * last + target[last:] if same else target


def _unchanged(node: ir.Node) -> ir.Value | None:
    """What an Expand is given, where its output has that shape already."""
    before, after = node.inputs[0] if node.inputs else None, node.outputs[0].shape
    if node.op_type != "Expand" or node.domain != "" or before is None:
        return None
    if before.shape is None or after is None or len(before.shape) != len(after):
        return None
    pairs = list(zip(before.shape, after, strict=True))
    return before if all(str(dim) == str(other) != "None" for dim, other in pairs) else None


def _kept(before: ir.Shape, dim: ir.SymbolicDim, axis: int) -> bool:
    return axis < len(before) and dim.value is not None and str(before[axis]) == str(dim)


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and ir.convenience.get_const_tensor(value) is not None


def _set_target(graph: ir.Graph, node: ir.Node, target: list[int], name: str) -> None:
    tensor = ir.tensor(np.array(target, dtype=np.int64), name=name)
    constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], num_outputs=1)
    constant.outputs[0].name = name
    constant.outputs[0].const_value = tensor
    graph.insert_before(node, constant)
    node.replace_input_with(1, constant.outputs[0])
    node.attributes.pop("allowzero", None)
