"""Every attention of a decoder, in the order of its layers."""

import onnx_ir as ir

from vtr_export.analysis.forms.decomposed import decomposed
from vtr_export.analysis.forms.form import Form, refusal
from vtr_export.analysis.forms.grouped import grouped
from vtr_export.analysis.forms.multi_head import multi_head
from vtr_export.analysis.forms.standard import standard

OTHERS = {
    "Attention", "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention",
    "PagedAttention", "SparseAttention", "PackedMultiHeadAttention", "PackedAttention",
    "LinearAttention", "CausalConvWithState", "QAttention", "LongformerAttention",
}  # fmt: skip


def find_forms(graph: ir.Graph) -> list[Form]:
    """The attentions that read a cache, first layer first (``graph`` is in topological order).

    Raises AnalysisError for one that is there and cannot be taken to pieces.
    """
    forms = []
    for node in graph:
        if node.domain == "com.microsoft" and node.op_type in OTHERS:
            raise refusal(node, "an attention of this kind cannot be cut")
        for read in (standard, grouped, multi_head, decomposed):
            form = read(node)
            if form is not None:
                forms.append(form)
                break
    return forms
