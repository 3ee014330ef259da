"""Let a decoder that was cut from its embeddings on begin at token ids again."""

import onnx_ir as ir

from vtr_export.passes.lift_embeddings import LIFTED


class LowerEmbeddings(ir.passes.InPlacePass):
    """Join what ``LiftEmbeddings`` parted.

    Before::

        lifted_embeddings = Gather(table, input_ids); layer_0(inputs_embeds)

    After::

        lifted_embeddings = Gather(table, input_ids); layer_0(lifted_embeddings)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Undo it, if it was done."""
        graph = model.graph
        embeds = next((value for value in graph.outputs if value.name == LIFTED), None)
        if embeds is None:
            return ir.passes.PassResult(model, modified=False)
        source = next(value for value in graph.inputs if value.name == "inputs_embeds")
        graph.outputs.remove(embeds)
        graph.inputs.remove(source)
        embeds.type, embeds.shape = embeds.type or source.type, source.shape
        source.replace_all_uses_with(embeds)
        return ir.passes.PassResult(model, modified=True)
