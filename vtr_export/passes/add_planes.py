"""Add features of their own to the streams that leave some layers (DeepStack)."""

from collections.abc import Sequence

import onnx_ir as ir

from vtr_export.analysis.layers import order_of, residual
from vtr_export.errors import AnalysisError


class AddPlanes(ir.passes.InPlacePass):
    """Give a decoder more inputs, each added to what leaves one of ``layers``, which ascend.

    Before::

        layer_0 → layer_1 → …

    After::

        layer_0 → Add(deepstack.0) → layer_1 → …
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = layers

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """The inputs come behind the others; AnalysisError for too few layers."""
        graph = model.graph
        sites = [node for node in graph if node.op_type == "Attention"]
        last = max(self.layers, default=-2)
        if len(sites) < last + 2:
            raise AnalysisError(
                f"{len(self.layers)} planes are added, the last behind layer {last}; there are "
                f"{len(sites)}",
                hint=f"take at least {last + 2} layers",
            )
        order = order_of(graph)
        streams = [residual(graph, sites[n], sites[n + 1], order) for n in self.layers]
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
