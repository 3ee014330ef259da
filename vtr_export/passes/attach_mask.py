"""Give every attention node of a decoder its mask: causal and blind to padding, but for groups."""

from typing import Final

import onnx_ir as ir

from vtr_export import ops
from vtr_export.errors import AnalysisError

READERS: Final = (("", "Attention", 3), ("", "Expand", 0))  # the second, to stand beside another


class AttachMask(ir.passes.InPlacePass):
    """Replace the stand-in input ``mask`` by one computed from ``attention_mask``.

    Before::

        Attention(query, keys, values, mask)

    After::

        mask = vtr.VtrCausalMask(attention_mask, inputs_embeds)     # [B,1,S,T], lower right
        Attention(query, keys, values, mask)

    With an input ``token_groups`` [B,S], tokens of one group see each other, too::

        mask = vtr.VtrGroupMask(attention_mask, token_groups, token_groups)

    but for the layers that read the stand-in ``mask.causal``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Swap the graph input and every use of the stand-in."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        if "mask" not in inputs:
            return ir.passes.PassResult(model, modified=False)
        padding = ir.val("attention_mask", ir.DataType.INT64, ["batch", "total"])
        groups = inputs.get("token_groups")
        rows = [inputs["inputs_embeds"]] if groups is None else [groups, groups]
        _attach(model, inputs["mask"], [padding, *rows])
        if causal := inputs.get("mask.causal"):
            _attach(model, causal, [padding, inputs["inputs_embeds"]])
            graph.inputs.remove(causal)
        graph.inputs[graph.inputs.index(inputs["mask"])] = padding
        return ir.passes.PassResult(model, modified=True)


def _attach(model: ir.Model, stand_in: ir.Value, told: list[ir.Value]) -> None:
    """A mask of what is ``told`` in place of ``stand_in``."""
    for node, index in stand_in.uses():
        if (node.domain, node.op_type, index) not in READERS:
            raise AnalysisError(
                f"the mask is read by {node.name!r} ({node.op_type}), which is no attention",
                hint="report the model: its decoder cannot be exported yet",
            )
    kind = ops.CAUSAL if len(told) == 2 else ops.GROUPED  # padding and rows, or groups, too
    mask = ir.Node(ops.DOMAIN, kind, told)
    mask.outputs[0].name = f"{stand_in.name}.0"
    mask.outputs[0].shape = ir.Shape(["batch", 1, "sequence", "total"])
    mask.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    ops.declare(model, kind)
    stand_in.replace_all_uses_with(mask.outputs[0])
    model.graph.insert_before(model.graph[0], mask)
