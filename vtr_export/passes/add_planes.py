"""Add features of their own to the streams that leave the first layers (DeepStack)."""

import onnx_ir as ir

from vtr_export.analysis.layers import order_of, residual
from vtr_export.errors import AnalysisError


class AddPlanes(ir.passes.InPlacePass):
    """Give a decoder ``count`` more inputs, each added to what leaves one layer.

    Before::

        layer_0 → layer_1 → …

    After::

        layer_0 → Add(deepstack.0) → layer_1 → …
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """The inputs come behind the others; AnalysisError for too few layers."""
        graph = model.graph
        sites = [node for node in graph if node.op_type == "Attention"]
        if self.count and len(sites) <= self.count:
            raise AnalysisError(
                f"{self.count} planes are added behind the first layers, of which there are "
                f"{len(sites)}",
                hint=f"take at least {self.count + 1} layers",
            )
        order = order_of(graph)
        pairs = zip(sites, sites[1:][: self.count], strict=False)
        streams = [residual(graph, before, after, order) for before, after in pairs]
        for number, stream in enumerate(streams):
            _add(graph, stream, number)
        return ir.passes.PassResult(model, modified=bool(streams))


def _add(graph: ir.Graph, stream: ir.Value, number: int) -> None:
    like = next(value for value in graph.inputs if value.name == "inputs_embeds")
    plane = ir.Value(name=f"deepstack.{number}", shape=like.shape, type=like.type)
    graph.inputs.append(plane)
    uses = list(stream.uses())
    node = ir.Node("", "Add", [stream, plane])
    both = node.outputs[0]
    both.name, both.shape, both.type = f"{stream.name}.deepstack", stream.shape, stream.type
    producer = stream.producer()
    assert producer is not None, "it leaves a layer"
    graph.insert_after(producer, node)
    for use in uses:
        use.node.replace_input_with(use.idx, both)
