"""Show the residual stream that a fused norm holds inside."""

from typing import Final

import onnx_ir as ir

from vtr_export.errors import AnalysisError

SKIP_NORMS: Final = {
    "SkipLayerNormalization": "LayerNormalization",
    "SkipSimplifiedLayerNormalization": "RMSNormalization",
}
EPSILON: Final = 1e-12  # what the contrib operators add where they do not say


class UnfuseSkipNorms(ir.passes.InPlacePass):
    """Write an addition and a norm instead of both in one.

    Before::

        y, mean, inv_std_var, sum = com.microsoft.SkipSimplifiedLayerNormalization(x, skip, scale)

    After::

        sum = Add(x, skip); y = RMSNormalization(sum, scale)

    ``SimplifiedLayerNormalization``, which is no operator of the standard, becomes
    ``RMSNormalization`` too.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at all, then write."""
        nodes = [node for node in model.graph if _is_skip(node) or _is_simplified(node)]
        for node in nodes:
            _check(node)
        for node in nodes:
            _write(model.graph, node)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _is_skip(node: ir.Node) -> bool:
    return node.domain == "com.microsoft" and node.op_type in SKIP_NORMS


def _is_simplified(node: ir.Node) -> bool:
    known = node.domain in ("", "com.microsoft")
    return known and node.op_type == "SimplifiedLayerNormalization"


def _check(node: ir.Node) -> None:
    read = [value for value in node.outputs[1:3] if value.uses() or value.is_graph_output()]
    if read:
        raise AnalysisError(
            f"the statistics of a norm, {read[0].name!r}, are read",
            where=f"node {node.name!r} ({node.op_type})",
            hint="export the decoder for inference",
        )


def _write(graph: ir.Graph, node: ir.Node) -> None:
    prefix = node.outputs[0].name
    new: list[ir.Node] = []

    def op(kind: str, inputs: list[ir.Value | None], name: str, *attributes: ir.Attr) -> ir.Value:
        made = ir.Node("", kind, inputs, attributes)
        made.name = made.outputs[0].name = f"{prefix}.{name}"
        made.outputs[0].type = node.outputs[0].type or (inputs[0].type if inputs[0] else None)
        new.append(made)
        return made.outputs[0]

    places = dict(enumerate(node.inputs))
    epsilon = node.attributes.get("epsilon")
    default = EPSILON if _is_skip(node) else 1e-5
    amount = ir.AttrFloat32("epsilon", epsilon.as_float() if epsilon else default)
    stream = places[0]
    if _is_skip(node):
        stream = op("Add", [stream, places[1]], "sum")
        is_layer = node.op_type == "SkipLayerNormalization"
        bias = places.get(4 if is_layer else 3)
        if bias is not None:
            stream = op("Add", [stream, bias], "biased")
        scales = [places.get(2), places.get(3)] if is_layer else [places.get(2)]
        kind = SKIP_NORMS[node.op_type]
    else:
        scales, kind = [places.get(1)], "RMSNormalization"
    while scales[-1] is None:
        scales.pop()
    axis = node.attributes.get("axis")
    along = ir.AttrInt64("axis", axis.as_int() if axis else -1)
    normed = op(kind, [stream, *scales], "normed", amount, along)
    graph.insert_before(node, new)
    pairs = [(node.outputs[0], normed)]
    if len(node.outputs) > 3 and stream is not None:
        pairs.append((node.outputs[3], stream))
    for old, value in pairs:
        if old.is_graph_output():
            value.name, old.name, value.shape = old.name, f"{old.name}.before", old.shape
        old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
