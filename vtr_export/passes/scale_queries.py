"""Scale queries before attention, so that nobody scales the cache."""

import math

import numpy as np
import onnx_ir as ir

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


class ScaleQueries(ir.passes.InPlacePass):
    """Multiply the query of every attention by the scale, and let attention scale by one.

    Before::

        heads = Attention <scale = 0.125> (query, keys, values, mask)

    After::

        heads.scale = Constant <value = float16 {0.125}> ()
        heads.scaled = Mul (query, heads.scale)
        heads = Attention <scale = 1.0> (heads.scaled, keys, values, mask)

    TensorRT's parser multiplies both query and keys by the root of the scale. Keys hold the past,
    so that every step would copy them, in every layer. What ranks tokens reads the query as it
    was. A query whose type or width is unknown keeps its attention as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite each; one that scales by one already is left alone."""
        found = [
            (node, scale)
            for node in model.graph
            if (node.domain, node.op_type) == ("", "Attention")
            and (scale := _scale(node)) not in (None, 1.0)
        ]
        for node, scale in found:
            _scale_query(model.graph, node, scale)
        return ir.passes.PassResult(model, modified=bool(found))


def _scale(node: ir.Node) -> float | None:
    """What attention multiplies scores by; None where the query says too little."""
    query = node.inputs[0]
    if query is None or query.dtype not in FLOATS:
        return None
    if (scale := node.attributes.get("scale")) is not None:
        return scale.as_float()
    width = query.shape[-1] if query.shape is not None and len(query.shape) == 4 else None
    return 1 / math.sqrt(width) if isinstance(width, int) else None


def _scale_query(graph: ir.Graph, node: ir.Node, scale: float) -> None:
    query = node.inputs[0]
    assert query is not None
    assert query.dtype is not None
    value = ir.tensor(np.array(scale).astype(query.dtype.numpy()))
    factor = ir.Node("", "Constant", [], [ir.AttrTensor("value", value)])
    product = ir.Node("", "Mul", [query, factor.outputs[0]])
    for made, what in ((factor, "scale"), (product, "scaled")):
        made.outputs[0].name = f"{node.outputs[0].name}.{what}"
        made.name = f"{node.outputs[0].name}.{made.op_type}"
    factor.outputs[0].type = product.outputs[0].type = query.type
    factor.outputs[0].shape, product.outputs[0].shape = ir.Shape([]), query.shape
    graph.insert_before(node, [factor, product])
    node.replace_input_with(0, product.outputs[0])
    node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
