"""Every attention of a graph, in whatever operators, described as far as the graph tells.

Nothing is refused here: ``forms`` takes to pieces what a cut needs, this says what is there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from vtr_export.analysis.axes import rank

MICROSOFT = "com.microsoft"
DECOMPOSED = "MatMul-Softmax-MatMul"
OTHERS = {
    "Attention", "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention", "PackedAttention",
    "PackedMultiHeadAttention", "PagedAttention", "QAttention", "SparseAttention",
}  # fmt: skip
UNARY = {"Cast", "Dropout", "Identity"}
LAYOUT = UNARY | {
    "Expand", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
PRODUCTS = {"MatMul", "FusedMatMul", "Einsum"}
MASKING = {"Add", "Max", "Sub", "Where"}
ON_LOGITS = UNARY | {"Add", "Div", "Max", "Mul", "Reshape", "Sub", "Tanh", "Where"}


@dataclass(frozen=True)
class Attention:
    """``first`` makes its logits and ``last`` its output: one node, unless it is written out.

    What the graph does not tell is None. ``masks`` are the values that hide keys; ``traits`` are
    words for what else it does (causal, a window, rotary inside …).
    """

    kind: str
    first: ir.Node
    last: ir.Node
    query: ir.Value | None
    key: ir.Value | None
    past: ir.Value | None
    heads: int | None
    kv_heads: int | None
    masks: tuple[ir.Value, ...] = ()
    traits: tuple[str, ...] = ()


def find_attentions(graph: ir.Graph) -> list[Attention]:
    """In the order of ``graph``."""
    logits = _logits(graph)
    found = (_read(node, logits) for node in graph)
    return [attention for attention in found if attention is not None]


def _logits(graph: ir.Graph) -> set[ir.Value]:
    """All that elementwise operators make of a product of two values that are no weights."""
    found: set[ir.Value] = set()
    for node in graph:
        if node.domain not in ("", MICROSOFT):
            continue
        is_product = node.op_type in PRODUCTS and not any(_is_weight(v) for v in node.inputs)
        if is_product or (node.op_type in ON_LOGITS and not found.isdisjoint(node.inputs)):
            found |= set(node.outputs)
    return found


def _read(node: ir.Node, logits: set[ir.Value]) -> Attention | None:
    if (node.domain, node.op_type) == ("", "Attention"):
        return _standard(node)
    if (node.domain, node.op_type) == ("", "Softmax"):
        return _decomposed(node, logits)
    if node.domain != MICROSOFT:
        return None
    if node.op_type == "GroupQueryAttention":
        return _grouped(node)
    if node.op_type == "MultiHeadAttention":
        return _multi_head(node)
    if node.op_type in OTHERS:
        heads = _integer(node, "num_heads")
        return Attention(
            f"{MICROSOFT}.{node.op_type}", node, node, _input(node, 0), _input(node, 0), None,
            heads, _integer(node, "kv_num_heads") or heads,
        )  # fmt: skip
    return None


def _standard(node: ir.Node) -> Attention:
    query, key = _input(node, 0), _input(node, 1)
    traits = [*_numbers(node, "softcap"), *(["causal"] if _integer(node, "is_causal") else [])]
    if _input(node, 6) is not None:
        traits.append("nonpad_kv_seqlen")
    past = _input(node, 4) or _cache(key)
    return Attention(
        "Attention",
        node,
        node,
        query,
        key,
        past,
        _integer(node, "q_num_heads") or _heads(query),
        _integer(node, "kv_num_heads") or _heads(key) or _heads(past),
        _given(_input(node, 3)),
        tuple(traits),
    )


def _grouped(node: ir.Node) -> Attention:
    window = _integer(node, "local_window_size") or -1
    traits = ["causal", *_numbers(node, "softcap")]
    traits += ["rotary inside"] if _integer(node, "do_rotary") else []
    traits += [f"window {window}"] if window > 0 else []
    traits += ["sinks"] if _input(node, 11) is not None else []
    return Attention(
        "GroupQueryAttention",
        node,
        node,
        _input(node, 0),
        _input(node, 1) or _input(node, 0),
        _input(node, 3),
        _integer(node, "num_heads"),
        _integer(node, "kv_num_heads"),
        _given(_input(node, 5), _input(node, 10)),
        tuple(traits),
    )


def _multi_head(node: ir.Node) -> Attention:
    heads = _integer(node, "num_heads")
    return Attention(
        "MultiHeadAttention",
        node,
        node,
        _input(node, 0),
        _input(node, 1) or _input(node, 0),
        _input(node, 6),
        heads,
        heads,
        _given(_input(node, 4), _input(node, 5)),
        ("causal",) if _integer(node, "unidirectional") else (),
    )


def _decomposed(softmax: ir.Node, logits: set[ir.Value]) -> Attention | None:
    """Around a softmax between two products of what is no weight."""
    masks: list[ir.Value] = []
    product = _product_before(softmax.inputs[0], logits, masks)
    weighted = _product_behind(softmax.outputs[0])
    if product is None or weighted is None:
        return None
    query, key = _input(product, 0), _input(product, 1)
    past = _cache(key)
    kv_heads = _heads(past) if past is not None else _heads(key)
    return Attention(
        DECOMPOSED,
        product,
        weighted,
        query,
        key,
        past,
        _heads(softmax.inputs[0]) or _heads(query),
        kv_heads,
        tuple(masks),
    )


def _product_before(
    value: ir.Value | None, logits: set[ir.Value], masks: list[ir.Value]
) -> ir.Node | None:
    """The product of queries and keys that ``value`` comes from; masks are noted on the way."""
    while value is not None and value in logits:
        node = value.producer()
        if node is None or node.op_type in PRODUCTS:
            return node
        ahead = [each for each in node.inputs if each in logits]
        if len(ahead) != 1:
            return None
        if node.op_type in MASKING:
            masks += [v for v in node.inputs if v not in (None, ahead[0]) and not _is_weight(v)]
        value = ahead[0]
    return None


def _product_behind(value: ir.Value) -> ir.Node | None:
    """The product of probabilities and values."""
    for _ in range(6):
        users = [use.node for use in value.uses() if use.node.op_type != "IsNaN"]
        if len(users) != 1:
            return None
        if users[0].op_type in PRODUCTS:
            return None if any(_is_weight(each) for each in users[0].inputs) else users[0]
        if users[0].op_type not in UNARY | {"Slice", "Where", "Reshape"}:
            return None
        value = users[0].outputs[0]
    return None


def _cache(value: ir.Value | None) -> ir.Value | None:
    """The graph input with past keys that is concatenated before ``value``."""
    for _ in range(16):
        node = value.producer() if value is not None else None
        if node is None or node.domain != "":
            return None
        if node.op_type == "Concat" and len(node.inputs) == 2:
            return _source(node.inputs[0])
        if node.op_type not in LAYOUT | {"Mul", "Div"}:
            return None
        value = node.inputs[0]
    return None


def _source(value: ir.Value | None) -> ir.Value | None:
    while value is not None and not value.is_graph_input():
        node = value.producer()
        if node is None or node.op_type not in LAYOUT:
            return None
        value = node.inputs[0]
    return value


def _heads(value: ir.Value | None) -> int | None:
    """Of [B,heads,…,d], or of [B,…,heads,d] where the second axis is a length."""
    if value is None or value.shape is None or rank(value) not in (4, 5):
        return None
    inner = [dim for dim in value.shape[1:-1] if _whole(dim) is not None]
    return _whole(inner[0]) if inner else None


def _whole(dim: object) -> int | None:
    """A dimension that is a number, be it written as a word."""
    return int(str(dim)) if str(dim).isdecimal() else None


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and (value.is_initializer() or value.const_value is not None)


def _given(*values: ir.Value | None) -> tuple[ir.Value, ...]:
    return tuple(value for value in values if value is not None)


def _input(node: ir.Node, number: int) -> ir.Value | None:
    return node.inputs[number] if number < len(node.inputs) else None


def _integer(node: ir.Node, name: str) -> int | None:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else None


def _numbers(node: ir.Node, *names: str) -> Iterator[str]:
    for name in names:
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.as_float():
            yield f"{name} {attribute.as_float():g}"
