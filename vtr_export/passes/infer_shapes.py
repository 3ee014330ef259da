"""Shapes of a foreign graph, from its inputs on, through operators that are no standard."""

from collections.abc import Callable
from typing import Final

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

MICROSOFT: Final = "com.microsoft"
SAME: Final = {
    "BiasGelu", "FastGelu", "Gelu", "LayerNormalization", "MoE", "QMoE", "QuickGelu",
    "RotaryEmbedding", "SimplifiedLayerNormalization",
}  # fmt: skip


class InferShapes(ir.passes.InPlacePass):
    """Forget the shapes between inputs and outputs, and derive them anew.

    Before::

        x: [s44,s29,"32"]; y = MatMulNBits<K = 32, N = 64>(x, …)

    After::

        x: [batch,sequence,32]; y: [batch,sequence,64]

    Inference that is not of ONNX Runtime knows no contrib operator: in a copy, a standard one of
    the same shapes stands in its place.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Infer in the copy, and read the shapes off it."""
        copy = model.clone()
        for node in copy.graph:
            for value in node.outputs:
                value.shape = None
        for node in list(copy.graph):
            _stand_in(copy.graph, node)
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(copy)
        found = {value.name: value for node in copy.graph for value in node.outputs}
        values = [value for node in model.graph for value in node.outputs]
        learnt = [_learn(value, found.get(value.name)) for value in values]
        return ir.passes.PassResult(model, modified=any(learnt))


def _learn(value: ir.Value, known: ir.Value | None) -> bool:
    """Take over what is known; whether it was news."""
    before = value.shape, value.type
    if known is not None:
        value.shape = known.shape if known.shape is not None else value.shape
        value.type = value.type or known.type
    return (value.shape, value.type) != before


def _stand_in(graph: ir.Graph, node: ir.Node) -> None:
    """Put a standard operator in the place of a contrib one whose shapes are known."""
    if node.domain == "" and node.op_type != "SimplifiedLayerNormalization":
        return
    if node.op_type in SAME:
        new = ir.Node("", "Identity", node.inputs[:1])
    elif node.domain == MICROSOFT and node.op_type in MADE:
        made = MADE[node.op_type](graph, node)
        if made is None:
            return
        new = made
    else:
        return
    old, value = node.outputs[0], new.outputs[0]
    value.name, value.type, old.name = old.name, old.type, None
    graph.insert_before(node, new)
    old.replace_all_uses_with(value, replace_graph_outputs=True)


def _quantised(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """``MatMulNBits``: [.., K] times [K, N]."""
    sizes = [node.attributes[name].as_int() for name in ("K", "N")]
    return ir.Node("", "MatMul", [node.inputs[0], _weight(graph, node, sizes)])


def _fused(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    turned = [node.attributes.get(name) for name in ("transA", "transB")]
    if any(attribute is not None and attribute.as_int() for attribute in turned):
        return None
    return ir.Node("", "MatMul", node.inputs[:2])


def _gathered(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    """``GatherBlockQuantized``: a row as wide as its blocks."""
    scales, block = node.inputs[2], node.attributes.get("block_size")
    shape = scales.shape if scales is not None else None
    width = shape[-1] if shape is not None else None
    if not isinstance(width, int):
        return None
    size = width * (block.as_int() if block is not None else 128)
    return ir.Node("", "Gather", [_weight(graph, node, [1, size]), node.inputs[1]])


def _weight(graph: ir.Graph, node: ir.Node, sizes: list[int]) -> ir.Value:
    first = node.inputs[0] if node.op_type == "MatMulNBits" else node.inputs[2]
    dtype = first.dtype if first is not None else None
    weight = ir.val(f"{node.outputs[0].name}.weight", dtype or ir.DataType.FLOAT, sizes)
    graph.inputs.append(weight)
    return weight


MADE: Final[dict[str, Callable[[ir.Graph, ir.Node], ir.Node | None]]] = {
    "FusedMatMul": _fused,
    "GatherBlockQuantized": _gathered,
    "MatMulNBits": _quantised,
}
