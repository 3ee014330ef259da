"""Decoder layers: one attention node each, and the residual stream that enters it."""

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from vtr_export.analysis.axes import Labels
from vtr_export.errors import AnalysisError


@dataclass(frozen=True)
class Layer:
    """Layer ``index``: ``entry`` [B,S,D] enters it, ``attention`` mixes its tokens.

    ``query`` [B,H,S,d]; ``key`` [B,kv_heads,S,d] of this call, ``keys`` with the past before it.
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


def find_layers(graph: ir.Graph, labels: Labels) -> list[Layer]:
    """The layers in order, anchored on attention nodes; names play no part.

    Raises AnalysisError for an attention node that is not fed past and mask in the canonical way.
    """
    sites = [node for node in graph if node.op_type == "Attention" and _is_site(node, labels)]
    layers: list[Layer] = []
    source = next(value for value in graph.inputs if value.name == "inputs_embeds")
    for index, node in enumerate(sites):
        entry = source if index == 0 else residual(graph, layers[-1].attention, node)
        layers.append(_layer(index, entry, node))
    return layers


def _is_site(node: ir.Node, labels: Labels) -> bool:
    query = node.inputs[0]
    return query is not None and query in labels and labels[query].token is not None


def _layer(index: int, entry: ir.Value, node: ir.Node) -> Layer:
    query, keys = node.inputs[0], node.inputs[1]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    concat = keys.producer() if keys is not None else None
    if query is None or keys is None or mask is None or concat is None:
        raise AnalysisError(
            f"layer {index}: attention node {node.name!r} has no mask or no computed keys",
            hint="export the decoder with past keys concatenated before the attention",
        )
    if concat.op_type != "Concat" or len(concat.inputs) != 2:
        raise AnalysisError(
            f"layer {index}: its keys are not a concatenation of past and new keys",
            where=f"node {concat.name!r} ({concat.op_type})",
            hint="export the decoder with past keys concatenated before the attention",
        )
    past_key, key = concat.inputs
    assert past_key is not None
    assert key is not None
    assert query.shape is not None
    width = query.shape[-1]
    scale = node.attributes.get("scale")
    if scale is None and not isinstance(width, int):
        raise AnalysisError(f"layer {index}: the width of a head is unknown")
    factor = scale.as_float() if scale is not None else float(int(width)) ** -0.5  # type: ignore[arg-type]
    return Layer(index, entry, node, query, key, past_key, keys, mask, factor)


def residual(graph: ir.Graph, before: ir.Node, after: ir.Node) -> ir.Value:
    """The last value before ``after`` that everything computed from ``before`` passes through."""
    ahead = ancestors(after.inputs, before)
    between = {node for value in before.outputs for node in descendants(value, ahead)}
    for node in reversed([node for node in graph if node in between]):
        for value in node.outputs:
            if _carries_all(value, before, between):
                return value
    raise AnalysisError(
        f"no single stream of tokens leads to attention node {after.name!r}",
        hint="vtr inspect shows what was found",
    )


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
