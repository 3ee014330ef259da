"""One attention, whatever operators it is written in: what goes in, and what it is worth."""

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from vtr_export.errors import AnalysisError


@dataclass(frozen=True)
class Mask:
    """A value [.., S, T] that says which keys a row sees: by true, by false, or by adding 0."""

    value: ir.Value
    says: Literal["visible", "hidden", "added"]


@dataclass(frozen=True)
class Rotary:
    """A rotation inside the attention: tables [positions, d/2], and where the rows stand.

    ``positions`` [B,S] is None where they follow from the length of the past.
    """

    cos: ir.Value
    sin: ir.Value
    is_interleaved: bool
    positions: ir.Value | None = None


@dataclass(frozen=True)
class Form:
    """An attention over past and new keys.

    ``query``, ``key`` and ``value`` of this call are [B,heads,S,d], or [B,S,heads·d] where they
    are ``flat``, or all in ``query`` where key and value are None. ``past`` and ``present`` are
    keys and values; a ``present`` may be unused. ``output`` is as flat as the query.
    """

    kind: str
    node: ir.Node
    query: ir.Value
    key: ir.Value | None
    value: ir.Value | None
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    output: ir.Value
    heads: int
    kv_heads: int
    head_dim: int
    is_flat: bool
    scale: float | None = None
    masks: tuple[Mask, ...] = ()
    is_causal: bool = False
    rotary: Rotary | None = None
    bias: ir.Value | None = None
    is_turned: bool = False  # keys, values and their past are [B,tokens,heads,d]


def refusal(node: ir.Node, why: str, hint: str = "") -> AnalysisError:
    """The attention ``node`` cannot be made one that a cut can be put before."""
    return AnalysisError(
        f"{node.op_type}: {why}",
        where=f"node {node.name!r} -> {node.outputs[0].name!r}",
        hint=hint or "export the decoder without it, or start from the checkpoint (--model)",
    )


def operand(node: ir.Node, number: int) -> ir.Value | None:
    """Input ``number``, where the node has it."""
    return node.inputs[number] if number < len(node.inputs) else None


def needed(node: ir.Node, number: int, what: str) -> ir.Value:
    """Input ``number``; AnalysisError without it."""
    value = operand(node, number)
    if value is None:
        raise refusal(node, f"it has no {what}", "a decoder takes its past and returns its present")
    return value


def output(node: ir.Node, number: int) -> ir.Value:
    """Output ``number``; AnalysisError without it."""
    if number >= len(node.outputs):
        raise refusal(node, "it returns no present keys and values", "export it with a cache")
    return node.outputs[number]


def integer(node: ir.Node, name: str, default: int = 0) -> int:
    """An attribute."""
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def number(node: ir.Node, name: str, default: float = 0.0) -> float:
    """An attribute."""
    attribute = node.attributes.get(name)
    return attribute.as_float() if attribute is not None else default


def cache_input(value: ir.Value | None) -> ir.Value | None:
    """The graph input that ``value`` is, or is a part or another layout of."""
    while value is not None and not value.is_graph_input():
        producer = value.producer()
        if producer is None or (producer.domain, producer.op_type) not in LAYOUT:
            return None
        value = producer.inputs[0]
    return value


LAYOUT = {
    ("", name)
    for name in (
        "Cast", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze",
        "Transpose", "Unsqueeze",
    )
}  # fmt: skip


def cache_shape(node: ir.Node, past: ir.Value, *, is_turned: bool = False) -> tuple[int, int]:
    """Heads and width of cached keys or values, from the shape that the graph's input declares."""
    source = cache_input(past)
    shape = source.shape if source is not None else None
    if shape is None or len(shape) < 4:
        raise refusal(node, f"the shape of its past {past.name!r} is unknown")
    heads, width = _whole(shape[-2 if is_turned != _turns(past) else -3]), _whole(shape[-1])
    if heads is None or width is None:
        raise refusal(node, f"heads and width of its past {past.name!r} are not in {shape}")
    return heads, width


def _turns(value: ir.Value | None) -> bool:
    """Whether tokens and heads change places between a cache and ``value``."""
    turned = False
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Transpose" and "perm" in node.attributes:
            turned ^= list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]
        value = node.inputs[0]
    return turned


def _whole(dim: object) -> int | None:
    """A dimension that is a number, be it written as a word."""
    text = str(dim)
    return int(text) if text.isdecimal() else None
