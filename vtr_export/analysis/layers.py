"""Decoder layers: one attention node each, and the residual stream that enters it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from vtr_export.analysis.axes import NONE, OPAQUE, Axes, Labels, rank
from vtr_export.errors import AnalysisError


@dataclass(frozen=True)
class Layer:
    """Layer ``index``: ``entry`` [B,S,D] enters it, ``attention`` mixes its tokens.

    ``query`` [B,H,S,d]; ``key`` [B,kv_heads,S,d] of this call, ``keys`` with the past before it.
    Where it ``crosses``, keys are those of images: [B,kv_heads,V,d] of this call.
    """

    index: int
    entry: ir.Value
    attention: ir.Node
    query: ir.Value
    key: ir.Value
    past_key: ir.Value
    keys: ir.Value
    mask: ir.Value
    scale: float
    softcap: float | None = None
    crosses: bool = False


def find_layers(graph: ir.Graph, labels: Labels) -> list[Layer]:
    """The layers in order, anchored on attention nodes; names play no part.

    Raises AnalysisError for an attention node that is not fed past and mask in the canonical way.
    """
    sites = [node for node in graph if _is_site(node, labels)]
    source = next((value for value in graph.inputs if value.name == "inputs_embeds"), None)
    if source is None:
        raise AnalysisError("the graph has no input inputs_embeds", hint="give it a decoder")
    _check_followed(graph, labels)
    layers: list[Layer] = []
    order = order_of(graph)
    for index, node in enumerate(sites):
        entry = source if index == 0 else residual(graph, layers[-1].attention, node, order)
        layers.append(_layer(index, entry, node, labels))
    return layers


def _is_site(node: ir.Node, labels: Labels) -> bool:
    return _is_attention(node) and _of(node.inputs[0], labels).token is not None


def _is_attention(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == ("", "Attention")


def _of(value: ir.Value | None, labels: Labels) -> Axes:
    return labels.get(value, NONE) if value is not None else NONE


def _check_followed(graph: ir.Graph, labels: Labels) -> None:
    """AnalysisError where tokens are lost on the way to an attention, naming the first place."""
    ends = [node for node in graph if _is_attention(node) and _of(node.inputs[0], labels).state]
    if not ends:
        return
    before = ancestors(ends[0].inputs[:1])
    lost = (
        (node, value)
        for node in graph
        for value in node.outputs
        if node in before and _of(value, labels).state == OPAQUE
    )
    node, value = next(lost, (ends[0], ends[0].outputs[0]))
    raise AnalysisError(
        f"{value.name!r} leads to an attention, and its axis of tokens cannot be told",
        where=f"node {node.name!r} ({node.op_type})",
        hint="vtr inspect shows the trail of token axes",
    )


def _layer(index: int, entry: ir.Value, node: ir.Node, labels: Labels) -> Layer:
    query, keys = node.inputs[:2]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    concat = keys.producer() if keys is not None else None
    if query is None or keys is None or mask is None or concat is None:
        raise _refusal(index, "its attention has no mask or no computed keys", node)
    if concat.op_type != "Concat" or len(concat.inputs) != 2:
        raise _refusal(index, "its keys are not a concatenation of past and new keys", concat)
    past_key, key = concat.inputs
    assert past_key is not None
    assert key is not None
    shaped = rank(query) == 4 and _of(query, labels).token == 2
    crosses = _of(keys, labels).vision_key is not None
    new, grown = ("vision", "vision_key") if crosses else ("token", "key")
    if not shaped or getattr(_of(keys, labels), grown) != 2:
        raise _refusal(index, "its query and keys are not [batch, heads, tokens, width]", node)
    if past_key in labels or getattr(_of(key, labels), new) != 2:
        raise _refusal(index, "its keys are not past keys before new ones", concat)
    for what, stands in _foreign(node):
        if stands:
            raise _refusal(index, f"its attention has {what}, which a score leaves out", node)
    scale, cap = _scale(index, node, query), node.attributes.get("softcap")
    softcap = (cap.as_float() or None) if cap is not None else None
    return Layer(index, entry, node, query, key, past_key, keys, mask, scale, softcap, crosses)


def _foreign(node: ir.Node) -> Iterator[tuple[str, bool]]:
    """What an Attention node can do beside softmax(softcap(scale · query · keys)) under a mask."""
    for name in ("is_causal", "qk_matmul_output_mode"):
        attribute = node.attributes.get(name)
        yield name, attribute is not None and bool(attribute.value)
    for number, name in ((4, "past_key"), (5, "past_value"), (6, "nonpad_kv_seqlen")):
        yield name, len(node.inputs) > number and node.inputs[number] is not None


def _scale(index: int, node: ir.Node, query: ir.Value) -> float:
    scale = node.attributes.get("scale")
    if scale is not None:
        return scale.as_float()
    width = query.shape[-1] if query.shape is not None else None
    if not isinstance(width, int):
        raise _refusal(index, "the width of a head is unknown", node)
    return 1 / math.sqrt(width)


def _refusal(index: int, why: str, node: ir.Node) -> AnalysisError:
    return AnalysisError(
        f"layer {index}: {why}",
        where=f"node {node.name!r} ({node.op_type})",
        hint="export the decoder with Attention(query, Concat(past, new), values, mask)",
    )


def order_of(graph: ir.Graph) -> Mapping[ir.Node, int]:
    """The place of each node in the topological order of ``graph``."""
    return {node: place for place, node in enumerate(graph)}


def residual(
    graph: ir.Graph,
    before: ir.Node,
    after: ir.Node,
    order: Mapping[ir.Node, int] | None = None,
) -> ir.Value:
    """The last value before ``after`` that everything computed from ``before`` passes through.

    ``order`` is ``order_of(graph)``, for who asks often.
    """
    order = order if order is not None else order_of(graph)
    between = _between(before, after, order)
    for node in sorted(between, key=order.__getitem__, reverse=True):
        for value in node.outputs:
            if _carries_all(value, before, between):
                return value
    raise AnalysisError(
        f"no single stream of tokens leads to attention node {after.name!r}",
        hint="vtr inspect shows what was found",
    )


def _between(before: ir.Node, after: ir.Node, order: Mapping[ir.Node, int]) -> set[ir.Node]:
    """Nodes computed from ``before`` that ``after`` is computed from; no other is looked at."""
    end = order[after]
    behind: set[ir.Node] = set()
    stack = [use.node for value in before.outputs for use in value.uses()]
    while stack:
        node = stack.pop()
        if node not in behind and order.get(node, end) < end:
            behind.add(node)
            stack.extend(use.node for value in node.outputs for use in value.uses())
    found: set[ir.Node] = set()
    stack = [after]
    while stack:
        for value in stack.pop().inputs:
            node_before = value.producer() if value is not None else None
            if node_before in behind and node_before not in found:
                found.add(node_before)
                stack.append(node_before)
    return found


def _carries_all(candidate: ir.Value, before: ir.Node, between: set[ir.Node]) -> bool:
    """True if nothing of ``before`` leaves ``between`` except through ``candidate``."""
    seen: set[ir.Node] = set()
    stack: list[ir.Value] = list(before.outputs)
    while stack:
        value = stack.pop()
        if value is candidate:
            continue
        for use in value.uses():
            if use.node not in between:
                return False
            if use.node not in seen:
                seen.add(use.node)
                stack.extend(use.node.outputs)
    return True


def ancestors(values: Iterable[ir.Value | None], stop: ir.Node | None = None) -> set[ir.Node]:
    """All nodes that ``values`` are computed from, not looking behind ``stop``."""
    found: set[ir.Node] = set()
    stack = [value.producer() for value in values if value is not None]
    while stack:
        node = stack.pop()
        if node is None or node is stop or node in found:
            continue
        found.add(node)
        stack.extend(value.producer() for value in node.inputs if value is not None)
    return found


def descendants(value: ir.Value, within: set[ir.Node] | None = None) -> set[ir.Node]:
    """All nodes computed from ``value`` (of ``within``, if given)."""
    found: set[ir.Node] = set()
    stack = [value]
    while stack:
        for use in stack.pop().uses():
            if use.node not in found and (within is None or use.node in within):
                found.add(use.node)
                stack.extend(use.node.outputs)
    return found
