"""``com.microsoft.MultiHeadAttention`` with a past."""

import onnx_ir as ir

from vtr_export.analysis.forms.form import (
    Form,
    Mask,
    cache_shape,
    integer,
    needed,
    number,
    operand,
    output,
    refusal,
)


def multi_head(node: ir.Node) -> Form | None:
    """The pieces of a ``MultiHeadAttention`` that reads a cache; None for one that does not."""
    if (node.domain, node.op_type) != ("com.microsoft", "MultiHeadAttention"):
        return None
    if operand(node, 6) is None:
        return None
    if operand(node, 4) is not None:
        raise refusal(node, "key_padding_mask: give it an attention_bias")
    for place, name in ((8, "past_sequence_length"), (9, "cache_indirection")):
        if operand(node, place) is not None:
            raise refusal(node, f"{name}: a shared cache of fixed size cannot change its length")
    past = needed(node, 6, "past keys"), needed(node, 7, "past values")
    heads, head_dim = cache_shape(node, past[0])
    added = operand(node, 5)
    return Form(
        kind="MultiHeadAttention",
        node=node,
        query=needed(node, 0, "query"),
        key=needed(node, 1, "keys (packed ones are another operator)"),
        value=needed(node, 2, "values"),
        past=past,
        present=(output(node, 1), output(node, 2)),
        output=node.outputs[0],
        heads=integer(node, "num_heads", heads),
        kv_heads=heads,
        head_dim=head_dim,
        is_flat=True,
        scale=number(node, "scale") or None,
        masks=() if added is None else (Mask(added, "added"),),
        is_causal=bool(integer(node, "unidirectional")),
        bias=operand(node, 3),
    )
