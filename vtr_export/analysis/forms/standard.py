"""``Attention`` of opset 23 and later, with its past inside or concatenated outside."""

import onnx_ir as ir

from vtr_export.analysis.axes import rank
from vtr_export.analysis.forms.form import (
    Form,
    Mask,
    cache_input,
    cache_shape,
    integer,
    needed,
    number,
    operand,
    output,
    refusal,
)

CAUSAL_OUTSIDE = "is_causal with the past outside sees the first keys only (upper left)"


def standard(node: ir.Node) -> Form | None:
    """The pieces of an ``Attention`` that reads a cache; None for one that does not."""
    if (node.domain, node.op_type) != ("", "Attention"):
        return None
    inside = operand(node, 4) is not None
    concats = [_concat(node.inputs[number]) for number in (1, 2)]
    if not inside and None in concats:
        return None
    _check(node)
    if inside:
        past = needed(node, 4, "past keys"), needed(node, 5, "past values")
        key, value = needed(node, 1, "keys"), needed(node, 2, "values")
        present = output(node, 1), output(node, 2)
    else:
        if integer(node, "is_causal"):
            raise refusal(node, CAUSAL_OUTSIDE)
        both = [concat for concat in concats if concat is not None]
        past = needed(both[0], 0, "past keys"), needed(both[1], 0, "past values")
        key, value = needed(both[0], 1, "keys"), needed(both[1], 1, "values")
        present = both[0].outputs[0], both[1].outputs[0]
    return _form(node, key, value, past, present)


def _form(
    node: ir.Node,
    key: ir.Value,
    value: ir.Value,
    past: tuple[ir.Value, ir.Value],
    present: tuple[ir.Value, ir.Value],
) -> Form:
    query = needed(node, 0, "query")
    kv_heads, head_dim = cache_shape(node, past[0])
    is_flat = "q_num_heads" in node.attributes
    heads = integer(node, "q_num_heads") or _heads(query, kv_heads)
    mask = operand(node, 3)
    said = "visible" if mask is not None and mask.dtype == ir.DataType.BOOL else "added"
    return Form(
        kind="Attention",
        node=node,
        query=query,
        key=key,
        value=value,
        past=past,
        present=present,
        output=node.outputs[0],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        is_flat=is_flat,
        scale=number(node, "scale") if "scale" in node.attributes else None,
        masks=() if mask is None else (Mask(mask, said),),  # type: ignore[arg-type]  # a literal
        is_causal=bool(integer(node, "is_causal")),
    )


def _heads(query: ir.Value, kv_heads: int) -> int:
    dim = query.shape[1] if query.shape is not None and rank(query) == 4 else None
    return dim if isinstance(dim, int) else kv_heads


def _concat(value: ir.Value | None) -> ir.Node | None:
    """The concatenation of a cached past and what is new."""
    node = value.producer() if value is not None else None
    if node is None or (node.domain, node.op_type) != ("", "Concat") or len(node.inputs) != 2:
        return None
    return node if cache_input(node.inputs[0]) is not None else None


def _check(node: ir.Node) -> None:
    if number(node, "softcap"):
        raise refusal(node, "softcap: a score would not be what it computes")
    if integer(node, "qk_matmul_output_mode") or len(node.outputs) > 3:
        raise refusal(node, "it shows its products")
    if operand(node, 6) is not None:
        raise refusal(node, "nonpad_kv_seqlen: a cache of fixed size cannot change its length")
