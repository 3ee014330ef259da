"""What a decoder's attention and MLP give, on the way to the residual stream."""

import onnx_ir as ir

NORM = "RMSNormalization"


def is_sandwiched(model: ir.Model) -> bool:
    """Whether something is normed just before it is added, as in Gemma 2 and 3."""
    sums = (node for node in model.graph if node.op_type == "Add")
    return any(_is_normed(value) for node in sums for value in node.inputs)


def _is_normed(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type == "Cast":
        inner = producer.inputs[0]
        producer = inner.producer() if inner is not None else None
    return producer is not None and producer.op_type == NORM
