"""Let a decoder that begins at token ids begin at their embeddings, for as long as it is cut."""

from collections.abc import Iterator

import onnx_ir as ir

from vtr_export.analysis.layers import ancestors, descendants
from vtr_export.errors import AnalysisError

LIFTED = "lifted_embeddings"


class LiftEmbeddings(ir.passes.InPlacePass):
    """Put an input where the embeddings come from.

    Before::

        embeds = Gather(table, input_ids); layer_0(embeds)

    After::

        lifted_embeddings = Gather(table, input_ids)     # an output
        layer_0(inputs_embeds)                           # an input

    ``LowerEmbeddings`` joins them again.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find the value that everything from the ids passes through."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        if "inputs_embeds" in inputs or "input_ids" not in inputs:
            return ir.passes.PassResult(model, modified=False)
        ids = inputs["input_ids"]
        embeds = _embeddings(graph, ids)
        new = ir.Value(name="inputs_embeds", type=embeds.type)
        width = embeds.shape[-1] if embeds.shape is not None else None
        new.shape = ir.Shape(["batch", "sequence", width])
        before = ancestors([embeds])
        _move_shapes(ids, new, before)
        embeds.replace_all_uses_with(new)
        embeds.name = LIFTED
        graph.inputs.insert(0, new)
        graph.outputs.append(embeds)
        return ir.passes.PassResult(model, modified=True)


def _embeddings(graph: ir.Graph, ids: ir.Value) -> ir.Value:
    """The last value before an attention that all of ``ids`` but their number goes through."""
    behind = descendants(ids)
    first = next((node for node in graph if node.op_type == "Attention" and node in behind), None)
    ahead = ancestors(first.inputs) & behind if first is not None else set()
    for node in reversed([node for node in graph if node in ahead]):
        for value in node.outputs:
            if _carries(ids, value):
                return value
    raise AnalysisError(
        "no single value holds the embeddings of input_ids",
        where=_where(ids),
        hint="export the decoder with inputs_embeds as its input",
    )


def _carries(ids: ir.Value, value: ir.Value) -> bool:
    before = ancestors([value])
    seen: set[ir.Node] = set()
    stack = [ids]
    while stack:
        for use in stack.pop().uses():
            if use.node.op_type == "Shape" or use.node in seen:
                continue
            if use.node not in before:
                return False
            seen.add(use.node)
            stack.extend(output for output in use.node.outputs if output is not value)
    return bool(seen)


def _where(ids: ir.Value) -> str:
    readers = ", ".join(sorted({str(use.node.name or use.node.op_type) for use in ids.uses()}))
    return f"read by {readers}"


def _shapes(ids: ir.Value, before: set[ir.Node]) -> Iterator[ir.Node]:
    for use in list(ids.uses()):
        if use.node.op_type == "Shape" and use.node not in before:
            yield use.node


def _move_shapes(ids: ir.Value, embeds: ir.Value, before: set[ir.Node]) -> None:
    """Who asks how many ids there are asks the embeddings: behind a cut they are fewer."""
    for node in _shapes(ids, before):
        node.replace_input_with(0, embeds)
        end = node.attributes.get("end")
        if end is None or end.as_int() < 0:
            node.attributes["end"] = ir.AttrInt64("end", 2 + (end.as_int() if end else 0))
        start = node.attributes.get("start")
        if start is not None and start.as_int() < 0:
            node.attributes["start"] = ir.AttrInt64("start", 2 + start.as_int())
