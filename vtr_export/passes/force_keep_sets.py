"""Let the caller say which tokens survive, instead of the scores."""

import onnx_ir as ir

from vtr_export import ops
from vtr_export.errors import AnalysisError


class ForceKeepSets(ir.passes.InPlacePass):
    """Turn every cut's decision into graph inputs, so that two runs drop the same tokens.

    Before::

        hidden', kept.J, vision_index' = vtr.VtrTopKPrune(query, keys, …, hidden)

    After::

        hidden' = vtr.VtrNarrow(hidden, kept.J)     # inputs kept.J [B,S'], kept_vision.J [B,k]

    The output ``kept.J`` goes; inputs that nothing reads any more stay. Where tokens are recycled
    there is also an input kept_label.J [B,V]: whose cluster each vision token is, or -1.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every composite; all are checked before the first is touched."""
        graph = model.graph
        cuts = [node for node in graph if ops.is_cut(node)]
        for node in cuts:
            _check(node)
        for node in cuts:
            _force(graph, node)
        if cuts:
            ops.declare(model, "VtrNarrow")
        if any(node.op_type == "VtrMerge" for node in graph):
            ops.declare(model, "VtrMerge")
        return ir.passes.PassResult(model, modified=bool(cuts))


def _check(node: ir.Node) -> None:
    name = node.outputs[1].name or ""
    if not name.startswith("kept.") or not node.outputs[1].is_graph_output():
        raise AnalysisError(
            f"the cut {node.name!r} does not show what it keeps as output kept.J, but as {name!r}",
            hint="only decoders written by vtr export can be forced",
        )


def _force(graph: ir.Graph, node: ir.Node) -> None:
    hidden, kept, vision, *labels = node.outputs
    number = (kept.name or "").removeprefix("kept.")
    graph.outputs.remove(kept)
    after = int(number) + 1
    ports = [(kept, "kept", f"sequence_{after}"), (vision, "kept_vision", f"vision_{after}")]
    ports += [(label, "kept_label", f"vision_{number}") for label in labels]
    inputs = []
    for old, name, axis in ports:
        shape = ["batch", axis]
        new = ir.val(f"{name}.{number}", ir.DataType.INT64, shape)
        inputs.append(new)
        old.replace_all_uses_with(new)
    graph.inputs.extend(inputs)
    narrow = ops.narrowing(node, *inputs)
    narrow[-1].name, result = node.name, narrow[-1].outputs[0]
    result.name, result.type, result.shape = hidden.name, hidden.type, hidden.shape
    hidden.replace_all_uses_with(result)
    graph.insert_before(node, narrow)
    graph.remove(node, safe=True)
