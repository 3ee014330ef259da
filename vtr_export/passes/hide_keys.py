"""Hide from the layers behind a cut what the cut would drop, and drop nothing."""

from collections.abc import Sequence

import onnx_ir as ir

from vtr_export.analysis import find_layers, label_axes, token_seeds
from vtr_export.ops import Choice
from vtr_export.passes.build import Build


class HideKeys(ir.passes.InPlacePass):
    """Give the layers from each of ``first_layers`` on a mask that a caller narrows.

    Before::

        Attention(query, keys, values, mask)

    After::

        Attention(query, keys, values, And(mask, visible.J))        # inputs visible.J [B,T]

    A row that survives a cut computes the same whether others are dropped or hidden: this is the
    twin that a graph with cuts is held against.
    """

    def __init__(self, first_layers: Sequence[int]) -> None:
        self.first_layers = tuple(first_layers)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """One mask a stage, on a canonical decoder without cuts."""
        graph = model.graph
        if any((value.name or "").startswith("visible.") for value in graph.inputs):
            return ir.passes.PassResult(model, modified=False)
        layers = find_layers(graph, label_axes(graph, token_seeds(graph)))
        build = Build(model, Choice(), "hidden")
        ends = [*self.first_layers[1:], len(layers)]
        for stage, (first, end) in enumerate(zip(self.first_layers, ends, strict=True)):
            name = f"visible.{stage}"
            visible = build.graph_input(name, ["batch", "total"], ir.DataType.INT64)
            real = build.op("Cast", [visible], f"real.{stage}", to=int(ir.DataType.BOOL))
            axes = build.constant([1, 2], f"axes.{stage}")
            wide = build.op("Unsqueeze", [real, axes], f"keys.{stage}")
            for layer in layers[first:end]:
                mask = build.op("And", [layer.mask, wide], f"mask.{layer.index}")
                layer.attention.replace_input_with(3, mask)
        return ir.passes.PassResult(model, modified=bool(self.first_layers))
