"""What a graph does between its inputs and its outputs, shown as outputs of its own."""

from itertools import pairwise

import onnx_ir as ir

from vtr_export import ops
from vtr_export.analysis.layers import residual

LENGTH_ONLY = (ops.CAUSAL, "VtrPack")  # their second input is read for its length
NORMS = ("RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization")


class ShowScores(ir.passes.InPlacePass):
    """Show what every cut ranks by.

    Before::

        hidden', kept.J, vision_index' = vtr.VtrTopKPrune(query, keys, mask, vision_index, …)

    After::

        score.J = vtr.VtrScore(query, keys, mask, vision_index, hidden)     # output [B, V]
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """The cuts themselves stay as they are."""
        graph = model.graph
        cuts = [node for node in graph if ops.is_cut(node)]
        for number, node in enumerate(cuts):
            shown = ops.scoring(node)
            _output(graph, shown[-1], f"score.{number}", ir.TensorType(ir.DataType.FLOAT))
            graph.insert_before(node, shown)
        return ir.passes.PassResult(model, modified=bool(cuts))


class ShowStreams(ir.passes.InPlacePass):
    """Show the last row of what enters each layer but the first, and of what leaves the last.

    Before::

        logits = …

    After::

        stream.1 = Gather(residual before layer 1, -1), …     # outputs [B, D]

    For a decoder whose keep-sets are forced: elsewhere scores branch off between the layers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find every stream first, then add the outputs."""
        graph = model.graph
        _take_lengths_from_keep_sets(graph)
        sites = [node for node in graph if node.op_type == "Attention"]
        streams = [residual(graph, before, after) for before, after in pairwise(sites)]
        final = [node.inputs[0] for node in graph if node.op_type in NORMS][-1:]
        for number, value in enumerate([*streams, *final], start=1):
            assert value is not None
            _show_last_row(graph, value, number)
        return ir.passes.PassResult(model, modified=bool(sites))


def _take_lengths_from_keep_sets(graph: ir.Graph) -> None:
    """Masks and positions read a stage's length off what a cut narrowed: no stream of tokens."""
    for node in graph:
        if node.domain == ops.DOMAIN and node.op_type in LENGTH_ONLY:
            narrow = node.inputs[1].producer() if node.inputs[1] is not None else None
            if narrow is not None and narrow.op_type == "VtrNarrow":
                node.replace_input_with(1, narrow.inputs[1])


def _show_last_row(graph: ir.Graph, value: ir.Value, number: int) -> None:
    index = ir.tensor(-1, dtype=ir.DataType.INT64, name=f"stream.{number}.index")
    last = ir.Node("", "Constant", [], [ir.AttrTensor("value", index)])
    gather = ir.Node("", "Gather", [value, last.outputs[0]], [ir.AttrInt64("axis", 1)])
    last.outputs[0].name = index.name
    last.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    _output(graph, gather, f"stream.{number}", value.type)
    graph.extend([last, gather])


def _output(graph: ir.Graph, node: ir.Node, name: str, kind: ir.TypeProtocol | None) -> None:
    """Make the one output of ``node`` an output of the graph, ``[B, …]``."""
    value = node.outputs[0]
    value.name, value.type, value.shape = name, kind, ir.Shape(["batch", None])
    graph.outputs.append(value)
