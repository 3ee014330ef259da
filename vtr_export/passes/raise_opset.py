"""Say that a graph is of a newer opset, where its nodes mean the same there."""

from typing import Final

import onnx
import onnx_ir as ir

from vtr_export.errors import AnalysisError

OLDEST: Final = 13
# From 13 on these only gained types, attributes with the old meaning as default, or wording.
GAINED: Final = {
    "Abs", "Add", "And", "ArgMax", "ArgMin", "Attention", "BitShift", "Cast", "CastLike", "Ceil",
    "Clip", "Concat", "Constant", "ConstantOfShape", "Cos", "CumSum", "DepthToSpace",
    "DequantizeLinear", "Div", "Dropout", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand",
    "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gemm", "Greater",
    "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "If", "IsInf", "IsNaN",
    "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "Loop",
    "MatMul", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "NonZero", "Not", "OneHot", "Or", "PRelu",
    "Pad", "Pow", "QuantizeLinear", "RMSNormalization", "Range", "Reciprocal", "ReduceSum", "Relu",
    "Reshape", "RotaryEmbedding", "Round", "Scan", "ScatterElements", "ScatterND", "Shape",
    "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax", "Softplus", "SpaceToDepth", "Sqrt",
    "Squeeze", "Sub", "Sum", "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where",
    "Xor",
}  # fmt: skip
# At 18 their axes became an input; Split's parts must be counted.
AXES: Final = {
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSumSquare",
}  # fmt: skip


class RaiseOpset(ir.passes.InPlacePass):
    """Give the graph the opset ``version``.

    Before::

        <opset_import: ["": 17]> ReduceMean<axes = [-1]>(x); Split<axis = 0>(x)

    After::

        <opset_import: ["": 24]> ReduceMean(x, [-1]); Split<axis = 0, num_outputs = 2>(x)

    A node whose operator changed in between, and of which it is not known how, is refused.
    """

    def __init__(self, version: int) -> None:
        self.version = version

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at every node, then write."""
        old = model.opset_imports.get("", 1)
        if old >= self.version:
            return ir.passes.PassResult(model, modified=False)
        if old < OLDEST:
            raise AnalysisError(
                f"the graph is of opset {old}; from {OLDEST} on it can be raised",
                hint=f"export it again with opset {OLDEST} or newer",
            )
        nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
        for node in nodes:
            _check(node, old, self.version)
        for node in nodes:
            if node.op_type in AXES and node.domain == "":
                _give_axes(node)
            if node.op_type == "Split" and node.domain == "" and len(node.inputs) < 2:
                node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
        model.opset_imports[""] = self.version
        return ir.passes.PassResult(model, modified=True)


def _check(node: ir.Node, old: int, new: int) -> None:
    """AnalysisError for an operator that means something else at the newer opset."""
    if node.domain != "" or node.op_type in GAINED | AXES or node.op_type == "Split":
        return
    try:
        first, last = (
            onnx.defs.get_schema(node.op_type, version, "").since_version for version in (old, new)
        )
    except onnx.defs.SchemaError:
        return  # a contrib operator that stands in the standard's domain
    if first != last:
        raise AnalysisError(
            f"{node.op_type} changed between opset {old} and {new}",
            where=f"node {node.name!r}",
            hint=f"export the decoder with opset {new}",
        )


def _give_axes(node: ir.Node) -> None:
    """``axes`` as an input instead of an attribute."""
    axes, graph = node.attributes.pop("axes", None), node.graph
    if axes is None or graph is None:
        return
    constant = ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", axes.as_ints())])
    constant.outputs[0].name = f"{node.outputs[0].name}.axes"
    graph.insert_before(node, constant)
    attributes = [attribute for attribute in node.attributes.values() if attribute.name != "axes"]
    copy = ir.Node("", node.op_type, [node.inputs[0], constant.outputs[0]], attributes)
    copy.name, old, new = node.name, node.outputs[0], copy.outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    graph.insert_before(node, copy)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
