"""``com.microsoft.GroupQueryAttention``, with or without its rotation."""

from typing import Final

import onnx_ir as ir

from vtr_export.analysis.forms.form import (
    Form,
    Mask,
    Rotary,
    cache_shape,
    integer,
    needed,
    number,
    operand,
    output,
    refusal,
)

UNKNOWN: Final = {11: "head_sink", 12: "k_scale", 13: "v_scale"}


def grouped(node: ir.Node) -> Form | None:
    """The pieces of a ``GroupQueryAttention``; it is causal by itself."""
    if (node.domain, node.op_type) != ("com.microsoft", "GroupQueryAttention"):
        return None
    _check(node)
    past = needed(node, 3, "past keys"), needed(node, 4, "past values")
    kv_heads, head_dim = cache_shape(node, past[0])
    bias = operand(node, 10)
    return Form(
        kind="GroupQueryAttention",
        node=node,
        query=needed(node, 0, "query"),
        key=operand(node, 1),
        value=operand(node, 2),
        past=past,
        present=(output(node, 1), output(node, 2)),
        output=node.outputs[0],
        heads=integer(node, "num_heads"),
        kv_heads=integer(node, "kv_num_heads", kv_heads),
        head_dim=head_dim,
        is_flat=True,
        scale=number(node, "scale") or None,
        masks=() if bias is None else (Mask(bias, "added"),),
        is_causal=True,
        rotary=_rotary(node) if integer(node, "do_rotary") else None,
    )


def _rotary(node: ir.Node) -> Rotary:
    cos, sin = needed(node, 7, "cos_cache"), needed(node, 8, "sin_cache")
    return Rotary(cos, sin, bool(integer(node, "rotary_interleaved")), operand(node, 9))


def _check(node: ir.Node) -> None:
    if number(node, "softcap"):
        raise refusal(node, "softcap: a score would not be what it computes")
    if integer(node, "local_window_size", -1) != -1:
        raise refusal(node, "local_window_size: a window over fewer tokens sees others")
    for name in ("smooth_softmax", "qk_output", "kv_cache_bit_width"):
        if integer(node, name) > 0:
            raise refusal(node, f"{name} is no plain attention")
    for place, name in UNKNOWN.items():
        if operand(node, place) is not None:
            raise refusal(node, f"its input {name} is no plain attention")
