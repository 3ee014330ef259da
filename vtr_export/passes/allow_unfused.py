"""Let TensorRT build the attention it has no fused kernel for."""

from typing import Final

import onnx_ir as ir

from vtr_export.targets import FUSED_HEAD_DIMS

DECOMPOSABLE: Final = "TRT_decomposable"


class AllowUnfused(ir.passes.InPlacePass):
    """Mark each Attention whose heads are of a width that no fused kernel takes.

    Before::

        y = Attention (q [B,H,S,8], k, v, mask)         # TensorRT builds no engine

    After::

        y = Attention <TRT_decomposable = 1> (q, k, v, mask)

    Unfused it holds the n x n scores. ONNX Runtime refuses the attribute: this is for engines.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Heads of unknown width are left alone."""
        found = [node for node in model.graph if _is_unfused(node)]
        for node in found:
            node.attributes[DECOMPOSABLE] = ir.AttrInt64(DECOMPOSABLE, 1)
        return ir.passes.PassResult(model, modified=bool(found))


def count_unfused(model: ir.Model) -> int:
    """How many were marked."""
    return sum(DECOMPOSABLE in node.attributes for node in model.graph)


def _is_unfused(node: ir.Node) -> bool:
    query = node.inputs[0] if node.op_type == "Attention" and node.domain == "" else None
    if query is None or query.shape is None or len(query.shape) != 4:
        return False
    width = query.shape[3]
    return isinstance(width, int) and width not in FUSED_HEAD_DIMS
