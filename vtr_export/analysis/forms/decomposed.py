"""Attention written out as MatMul, Softmax, MatMul, as exporters before opset 23 do."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from vtr_export.analysis.axes import rank
from vtr_export.analysis.forms.form import Form, Mask, cache_input, cache_shape, refusal
from vtr_export.analysis.layers import ancestors

PLAIN = {"Cast", "Identity", "Dropout"}
RELAID = {"Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
LOWEST = -1000.0  # what hides a key is at most this


@dataclass
class _Logits:
    """What leads from a product of queries and keys to a softmax."""

    product: ir.Node | None = None
    scale: float = 1.0
    masks: list[Mask] = field(default_factory=list)


def decomposed(node: ir.Node) -> Form | None:
    """The pieces of an attention around ``Softmax``; None for another softmax.

    How keys and values come from the cache (heads repeated, axes turned) is not asked here: who
    rewrites them compares the outcome.
    """
    if (node.domain, node.op_type) != ("", "Softmax"):
        return None
    weighted = _weighted(node.outputs[0])
    found = _logits(node.inputs[0], _Logits())
    if weighted is None or found is None or found.product is None:
        return None
    keys, factor = _cached(found.product.inputs[1])
    values, other = _cached(weighted.inputs[1])
    query = found.product.inputs[0]
    if keys is None or values is None or query is None:
        return None
    if other != 1.0:
        raise refusal(node, "its values are scaled")
    if rank(query) not in (4, None):
        raise refusal(node, "its heads lie beside its rows ([batch·heads, S, d])")
    kv_heads, head_dim = cache_shape(node, _first(keys), is_turned=_is_turned(keys))
    return Form(
        kind="MatMul-Softmax-MatMul",
        node=node,
        query=query,
        key=keys.inputs[1],
        value=values.inputs[1],
        past=(_first(keys), _first(values)),
        present=(keys.outputs[0], values.outputs[0]),
        output=_cleaned(weighted, found.masks),
        heads=kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        is_flat=False,
        scale=found.scale * factor,
        masks=tuple(found.masks),
        is_turned=_is_turned(keys),
    )


def _is_turned(concat: ir.Node) -> bool:
    axis = concat.attributes["axis"].as_int()
    if axis not in (1, -3, 2, -2):
        raise refusal(concat, f"past and new keys are joined along axis {axis}")
    return axis in (1, -3)


def _first(concat: ir.Node) -> ir.Value:
    value = concat.inputs[0]
    assert value is not None
    return value


def _logits(value: ir.Value | None, found: _Logits) -> _Logits | None:
    """Walk up from the softmax to the product; None where another kind of node stands."""
    while value is not None:
        node = value.producer()
        if node is None or node.domain not in ("", "com.microsoft"):
            return None
        if node.op_type in ("MatMul", "FusedMatMul"):
            return found if _take_product(node, found) else None
        if node.op_type in PLAIN:
            value = node.inputs[0]
        elif node.op_type in ("Mul", "Div"):
            value = _scaled(node, found)
        elif node.op_type in ("Add", "Where", "Max"):
            value = _masked(node, found)
        else:
            return None
    return None


def _take_product(node: ir.Node, found: _Logits) -> bool:
    found.product = node
    for name, attribute in node.attributes.items():
        if name == "alpha":
            found.scale *= attribute.as_float()
        elif attribute.as_int() and name != "transB":
            return False
    return True


def _scaled(node: ir.Node, found: _Logits) -> ir.Value | None:
    """The operand that a number scales."""
    for place in (1, 0) if node.op_type == "Mul" else (1,):
        factor = scalar(node.inputs[place])
        if factor:
            found.scale *= factor if node.op_type == "Mul" else 1 / factor
            return node.inputs[1 - place]
    return None


def _masked(node: ir.Node, found: _Logits) -> ir.Value | None:
    """The logits behind a mask: Add(logits, mask), Where(visible, logits, low) or Max."""
    if node.op_type == "Max":
        floor = scalar(node.inputs[1]) if len(node.inputs) == 2 else None
        return node.inputs[0] if floor is not None and floor <= LOWEST else None
    if node.op_type == "Where":
        condition, first, second = node.inputs
        assert condition is not None
        for logits, other, said in ((first, second, "visible"), (second, first, "hidden")):
            low = scalar(other)
            if low is not None and low <= LOWEST:
                found.masks.append(Mask(condition, said))  # type: ignore[arg-type]  # a literal
                return logits
        return None
    for logits, mask in (node.inputs, reversed(node.inputs)):
        if mask is not None and _is_product(logits):
            found.masks.append(Mask(mask, "added"))
            return logits
    return None


def _is_product(value: ir.Value | None) -> bool:
    """Whether a product of queries and keys is what ``value`` comes from, through numbers only."""
    found = _Logits()
    return _logits(value, found) is not None and found.product is not None


def _weighted(value: ir.Value) -> ir.Node | None:
    """The product of probabilities and values."""
    while True:
        users = [use.node for use in value.uses()]
        if len(users) == 1 and users[0].op_type == "MatMul" and users[0].inputs[0] is value:
            return users[0]
        wheres = [node for node in users if node.op_type == "Where" and node.inputs[2] is value]
        if len(users) == 1 and users[0].op_type in PLAIN:
            value = users[0].outputs[0]
        elif len(wheres) == 1 and _zero(wheres[0].inputs[1]) and _only_nan(users, wheres[0]):
            value = wheres[0].outputs[0]
        else:
            return None


def _only_nan(users: Iterable[ir.Node], where: ir.Node) -> bool:
    return all(node is where or node.op_type == "IsNaN" for node in users)


def _cleaned(weighted: ir.Node, masks: list[Mask]) -> ir.Value:
    """The product, or behind it where rows that see nothing are made zero."""
    value = weighted.outputs[0]
    users = [use.node for use in value.uses()]
    if len(users) != 1 or users[0].op_type != "Where":
        return value
    condition, zero, kept = users[0].inputs
    known = ancestors([mask.value for mask in masks])
    about_masks = condition is not None and bool(ancestors([condition]) & known)
    return users[0].outputs[0] if kept is value and _zero(zero) and about_masks else value


def _cached(value: ir.Value | None) -> tuple[ir.Node | None, float]:
    """The concatenation of past and new behind ``value``, and the number it is scaled by."""
    factor = 1.0
    while value is not None:
        node = value.producer()
        if node is None or node.domain != "":
            return None, factor
        if node.op_type == "Concat":
            is_cache = len(node.inputs) == 2 and cache_input(node.inputs[0]) is not None
            return (node if is_cache else None), factor
        if node.op_type in ("Mul", "Div"):
            found = _Logits()
            value = _scaled(node, found)
            factor *= found.scale
        elif node.op_type in RELAID or node.op_type in PLAIN:
            value = node.inputs[0]
        else:
            return None, factor
    return None, factor


def _zero(value: ir.Value | None) -> bool:
    return scalar(value) == 0.0


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one entry is."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(-1)[0])
