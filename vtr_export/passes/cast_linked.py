"""Let linked weights keep the dtype they are stored in."""

import onnx_ir as ir

from vtr_export.weights import CheckpointTensor, source_dtype


class CastLinked(ir.passes.InPlacePass):
    """Move a weight's cast from the copy, which linking does not make, into the graph.

    Before::

        MatMul(x, weight: fp32)             # stored as fp16

    After::

        MatMul(x, Cast(weight: fp16))
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert one cast behind each weight whose stored dtype is another one."""
        modified = False
        for value in list(model.graph.initializers.values()):
            weight = value.const_value
            if not isinstance(weight, CheckpointTensor) or not value.uses():
                continue
            stored = source_dtype(weight.ref)
            if stored != weight.dtype:
                _cast(model.graph, value, weight, stored)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _cast(graph: ir.Graph, value: ir.Value, weight: CheckpointTensor, stored: ir.DataType) -> None:
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", weight.dtype)])
    result = cast.outputs[0]
    result.name, result.shape = f"{value.name}.cast", value.shape
    result.type = ir.TensorType(weight.dtype)
    for use in [use for use in value.uses() if use.node is not cast]:
        use.node.replace_input_with(use.idx, result)
    value.const_value = CheckpointTensor(
        weight.ref, name=value.name or "", dtype=stored, transpose=weight.transpose
    )
    value.type = ir.TensorType(stored)
    graph.insert_before(graph[0], cast)
