"""Positions that a foreign graph counts by itself, given as an input instead."""

from collections.abc import Sequence

import onnx_ir as ir

from vtr_export.analysis.layers import ancestors, descendants
from vtr_export.errors import VtrError
from vtr_export.retrofit.probe import Array, Lengths, Part, positions

CALLS = (Lengths.drawn(1, 0, 5), Lengths.drawn(1, 4, 3), Lengths.drawn(2, 2, 3))
WHOLE = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT)


def explicit_positions(model: ir.Model) -> None:
    """Where a value counts this call's rows behind the past, ``position_ids`` takes its place.

    Such values are found by what they are for calls of several lengths, not by how they are made.
    A value that follows from lengths in another way stays: it is refused where it meets a cut.
    """
    graph = model.graph
    named = {value.name: value for value in graph.inputs}
    source = named.get("inputs_embeds") or named.get("input_ids")
    if source is None:
        return
    found = _counting(model, _candidates(graph, source))
    if not found:
        return
    given = named.get("position_ids")
    if given is None:
        given = ir.val("position_ids", ir.DataType.INT64, ["batch", "sequence"])
        graph.inputs.append(given)
    for value, own, axis in found:
        _replace(graph, value, given, own, axis)


def _candidates(graph: ir.Graph, source: ir.Value) -> list[ir.Value]:
    """Numbers that follow from lengths and the mask alone, on the way to queries and keys."""
    sites = [node for node in graph if (node.domain, node.op_type) == ("", "Attention")]
    ahead = ancestors([value for site in sites for value in site.inputs])
    tainted = _tainted(graph, source)
    counted: set[ir.Node] = set()
    starts = [node for node in graph if node.op_type in ("Range", "CumSum")]
    for node in starts:
        counted |= {node} | {
            each for value in node.outputs for each in descendants(value) if each not in tainted
        }
    nodes = [node for node in graph if node in counted and node in ahead and node not in tainted]
    return [
        value
        for node in nodes
        if not node.domain
        for value in node.outputs[:1]
        if value.dtype in (None, *WHOLE)
    ]


def _tainted(graph: ir.Graph, source: ir.Value) -> set[ir.Node]:
    """Nodes that read what tokens are, not only how many."""
    found: set[ir.Node] = set()
    stack = [source, *(value for value in graph.inputs if value.name == "position_ids")]
    while stack:
        for use in stack.pop().uses():
            if use.node not in found and use.node.op_type != "Shape":
                found.add(use.node)
                stack.extend(use.node.outputs)
    return found


def _counting(model: ir.Model, candidates: Sequence[ir.Value]) -> list[tuple[ir.Value, int, int]]:
    """Those that are 0, 1, 2 … behind the past in every call: value, rank and axis of tokens."""
    found: list[tuple[ir.Value, int, int]] = []
    behind: set[ir.Node] = set()
    for value in candidates:
        if value.producer() in behind:
            continue
        place = _place(model, value)
        if place is not None:
            found.append((value, *place))
            behind |= descendants(value)
    return found


def _place(model: ir.Model, value: ir.Value) -> tuple[int, int] | None:
    """Rank and axis of tokens of a value [1 or B, …, S, …] that counts rows in every call."""
    places = set()
    try:
        part = Part(model, [value])
        for lengths in CALLS:
            places.add(_axis(part(lengths)[0], lengths))
    except VtrError:
        return None
    return places.pop() if len(places) == 1 else None


def _axis(array: Array, lengths: Lengths) -> tuple[int, int] | None:
    expected = positions(lengths)
    for axis in range(1, array.ndim):
        rest = [size for other, size in enumerate(array.shape) if other not in (0, axis)]
        if array.shape[axis] != lengths.new or array.shape[0] not in (1, len(expected)):
            continue
        rows = array.reshape(array.shape[0], -1)
        if set(rest) <= {1} and (rows == expected[: len(rows)]).all():
            return array.ndim, axis
    return None


def _replace(graph: ir.Graph, value: ir.Value, given: ir.Value, own: int, axis: int) -> None:
    """``given`` [B,S] in the rank and type of ``value``."""
    producer = value.producer()
    assert producer is not None
    new: list[ir.Node] = []
    last = given
    others = [place for place in range(1, own) if place != axis]
    if others:
        axes = ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", others)])
        axes.outputs[0].name = f"{value.name}.axes"
        new += [axes, ir.Node("", "Unsqueeze", [last, axes.outputs[0]])]
        last = new[-1].outputs[0]
        last.name = f"{value.name}.given"
    if value.dtype not in (None, ir.DataType.INT64):
        assert value.dtype is not None
        new.append(ir.Node("", "Cast", [last], [ir.AttrInt64("to", value.dtype)]))
        last = new[-1].outputs[0]
        last.name = f"{value.name}.cast"
    graph.insert_before(producer, new)
    value.replace_all_uses_with(last)
