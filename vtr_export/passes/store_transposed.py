"""Let copied weights be stored the way they are multiplied."""

from collections.abc import Set

import onnx_ir as ir

from vtr_export.weights import CheckpointTensor


class StoreTransposed(ir.passes.InPlacePass):
    """Move a weight's transposition from every load to the one copy.

    Before::

        MatMul(x, Transpose(weight: [out, in]))

    After::

        MatMul(x, weight: [in, out])                            # stored transposed
        Gemm(Squeeze(x), weight: [out, in], transB=1)           # shared with another graph
    """

    def __init__(self, shared: Set[str] = frozenset()) -> None:
        self.shared = shared

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Transpose each 2-D weight that is only ever used transposed, unless it is shared."""
        modified = False
        for value in list(model.graph.initializers.values()):
            weight = value.const_value
            nodes = [use.node for use in value.uses()]
            if not isinstance(weight, CheckpointTensor) or not nodes:
                continue
            is_shared = weight.ref.name in self.shared
            if value.is_graph_output() or not all(_can_go(node, is_shared) for node in nodes):
                continue
            modified = True
            for node in nodes:
                if is_shared:
                    _multiply_transposed(model.graph, node, value)
                else:
                    node.outputs[0].replace_all_uses_with(value)
                    model.graph.remove(node, safe=True)
            if not is_shared:
                _transpose(value, weight)
        return ir.passes.PassResult(model, modified=modified)


def _can_go(node: ir.Node, is_shared: bool) -> bool:
    """Whether ``node`` transposes for others in this graph that can do without it."""
    if not _swaps_two_axes(node) or node.outputs[0].is_graph_output():
        return False
    return not is_shared or all(_is_row_product(*use) for use in node.outputs[0].uses())


def _is_row_product(node: ir.Node, index: int) -> bool:
    """Whether ``node`` multiplies [B,1,in] by its input ``index``."""
    rows = node.inputs[0]
    shape = rows.shape if rows is not None else None
    is_right = (node.domain, node.op_type, index) == ("", "MatMul", 1)
    return is_right and shape is not None and len(shape) == 3 and shape[1] == 1


def _swaps_two_axes(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm")
    return (
        node.op_type == "Transpose"
        and permutation is not None
        and tuple(permutation.as_ints()) == (1, 0)
    )


def _transpose(value: ir.Value, weight: CheckpointTensor) -> None:
    turned = CheckpointTensor(
        weight.ref, name=value.name or "", dtype=weight.dtype, transpose=not weight.transpose
    )
    value.const_value = turned
    value.shape = turned.shape


def _multiply_transposed(graph: ir.Graph, transpose: ir.Node, weight: ir.Value) -> None:
    """Rewrite each product of [B,1,in] by the transposed weight as a Gemm that reads it as is."""
    for matmul in [use.node for use in transpose.outputs[0].uses()]:
        product = matmul.outputs[0]
        axes = ir.tensor([1], name=f"{product.name}.axes")
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", axes)])
        squeeze = ir.Node("", "Squeeze", [matmul.inputs[0], constant.outputs[0]])
        gemm = ir.Node(
            "",
            "Gemm",
            [squeeze.outputs[0], weight],
            [ir.AttrInt64("transB", 1)],
        )
        widen = ir.Node("", "Unsqueeze", [gemm.outputs[0], constant.outputs[0]])
        for node, suffix in ((constant, "axes"), (squeeze, "row"), (gemm, "gemm")):
            node.outputs[0].name = f"{product.name}.{suffix}"
        widen.outputs[0].shape, widen.outputs[0].type = product.shape, product.type
        widen.outputs[0].name, product.name = product.name, None
        graph.insert_before(matmul, [constant, squeeze, gemm, widen])
        product.replace_all_uses_with(widen.outputs[0], replace_graph_outputs=True)
        graph.remove(matmul, safe=True)
    graph.remove(transpose, safe=True)
