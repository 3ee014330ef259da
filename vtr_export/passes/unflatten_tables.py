"""Rotate by tables [B,S,d/2], not by a list of all rows of a batch."""

import onnx_ir as ir

from vtr_export.analysis.axes import rank


class UnflattenTables(ir.passes.InPlacePass):
    """Undo what fits computed tables to an operator that looks rows up.

    Before::

        com.microsoft.RotaryEmbedding(x, 0 … B·S-1, Reshape(cos: [B,S,n], [-1,n]), Reshape(sin))

    After::

        RotaryEmbedding(x, cos, sin)

    That the rows are looked up one after another is for the caller to compare.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Every rotation by two such tables."""
        found = [(node, tables) for node in model.graph if (tables := _tables(node)) is not None]
        for node, tables in found:
            _write(model.graph, node, tables)
        return ir.passes.PassResult(model, modified=bool(found))


def _tables(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Cos and sin before they were laid flat."""
    if (node.domain, node.op_type) != ("com.microsoft", "RotaryEmbedding"):
        return None
    scale = node.attributes.get("scale")
    cos, sin = (_wide(value) for value in node.inputs[2:4])
    is_plain = scale is None or scale.as_float() == 1.0
    return (cos, sin) if cos is not None and sin is not None and is_plain else None


def _wide(value: ir.Value | None) -> ir.Value | None:
    node = value.producer() if value is not None else None
    if node is None or (node.domain, node.op_type) != ("", "Reshape"):
        return None
    source = node.inputs[0]
    return source if rank(source) == 3 and rank(value) == 2 else None


def _write(graph: ir.Graph, node: ir.Node, tables: tuple[ir.Value, ir.Value]) -> None:
    names = ("interleaved", "num_heads", "rotary_embedding_dim")
    attributes = [node.attributes[name] for name in names if name in node.attributes]
    new = ir.Node("", "RotaryEmbedding", [node.inputs[0], *tables], attributes)
    new.name, old, value = node.name, node.outputs[0], new.outputs[0]
    value.name, value.type, value.shape, old.name = old.name, old.type, old.shape, None
    graph.insert_before(node, new)
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
