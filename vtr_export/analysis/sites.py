"""Where a schedule's cuts go in a graph, and which values cross them."""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from vtr_export import ops
from vtr_export.analysis.axes import NONE, Axes, Labels, rank
from vtr_export.analysis.layers import Layer, ancestors
from vtr_export.errors import AnalysisError
from vtr_export.schedule import Cut, Resolved


@dataclass(frozen=True)
class Stream:
    """A value with a token axis that the layers after a cut still need."""

    value: ir.Value
    axis: int


@dataclass(frozen=True)
class Site:
    """One cut, found: ``entry`` [B,S,D] is narrowed by score, ``streams`` by its indices.

    ``scored`` is the layer whose attention ranks the tokens; ``after`` is every node that runs
    on the survivors; ``masks`` are the masks those nodes read (rebuilt, not gathered).
    """

    cut: Cut
    scored: Layer
    entry: ir.Value
    after: frozenset[ir.Node]
    streams: tuple[Stream, ...]
    masks: tuple[ir.Value, ...]


def find_sites(layers: list[Layer], labels: Labels, schedule: Resolved) -> list[Site]:
    """One site for each cut of ``schedule``, from shallow to deep; the graph stays untouched.

    Raises AnalysisError naming the value that cannot be followed across a cut.
    """
    if len(layers) != schedule.layers:
        raise AnalysisError(
            f"the graph has {len(layers)} attention layers, the model {schedule.layers}",
            hint="vtr inspect lists the layers that were found",
        )
    entries = [_entry(layers, labels, schedule, cut) for cut in schedule.cuts]
    reaches: list[_Reach] = []
    for entry in reversed(entries):
        reaches.insert(0, _reach(entry, reaches[0] if reaches else None))
    each = zip(schedule.cuts, reaches, strict=True)
    return [_find(layers, labels, schedule, cut, reach) for cut, reach in each]


@dataclass(frozen=True)
class _Reach:
    """All nodes computed from ``entry``, and the values that they read and do not make."""

    entry: ir.Value
    nodes: frozenset[ir.Node]
    read: tuple[ir.Value, ...]

    def makes(self, value: ir.Value | None) -> bool:
        """Whether ``value`` follows from the entry; masks count as made before it."""
        producer = value.producer() if value is not None else None
        return producer is not None and producer in self.nodes and not ops.is_mask(producer)


def _reach(entry: ir.Value, deeper: _Reach | None) -> _Reach:
    """What a deeper entry reaches is not walked again."""
    known = deeper.nodes if deeper is not None else frozenset()
    nodes: set[ir.Node] = set()
    stack = [entry]
    while stack:
        for use in stack.pop().uses():
            if use.node not in nodes and use.node not in known:
                nodes.add(use.node)
                stack.extend(use.node.outputs)
    if deeper is not None and deeper.entry is not entry and deeper.entry.producer() not in nodes:
        return _reach(entry, None)
    found = _Reach(entry, known | nodes, ())
    read: dict[ir.Value, None] = {}
    inputs = [value for node in nodes if not ops.is_mask(node) for value in node.inputs]
    for value in (*inputs, *(deeper.read if deeper is not None else ())):
        if value is not None and value is not entry and not found.makes(value):
            read[value] = None
    return _Reach(entry, found.nodes, tuple(read))


def _entry(layers: list[Layer], labels: Labels, schedule: Resolved, cut: Cut) -> ir.Value:
    """What the cut narrows by score."""
    layer = cut.before_layer
    if schedule.drop_point == "inside":
        return _mixed(layers[layer - 1], labels)
    if schedule.drop_point == "attended":
        return _attended(layers[layer - 1], layers[layer], labels)
    return layers[layer].entry


def _find(layers: list[Layer], labels: Labels, schedule: Resolved, cut: Cut, reach: _Reach) -> Site:
    layer, entry = cut.before_layer, reach.entry
    scored = layers[layer - 1 if schedule.source == "previous" else layer]
    _check_entry(layer, entry, labels)
    for reader in (scored, *layers[layer:]):
        _check_mask(reader)
    if schedule.source == "next":
        _check_projections(scored, reach)
    streams, masks = _live_outs(layer, reach, labels)
    after = frozenset(node for node in reach.nodes if not ops.is_mask(node))
    return Site(cut, scored, entry, after, streams, masks)


def _check_entry(layer: int, entry: ir.Value, labels: Labels) -> None:
    if rank(entry) == 3 and labels.get(entry, NONE) == Axes(token=1):
        return
    raise AnalysisError(
        f"layer {layer}: the stream {entry.name!r} that enters it is not [batch, tokens, width]",
        where=_place(entry),
        hint="vtr inspect shows the trail of token axes",
    )


def _check_mask(layer: Layer) -> None:
    producer = layer.mask.producer()
    if producer is None or not ops.is_mask(producer):
        raise AnalysisError(
            f"layer {layer.index}: its mask {layer.mask.name!r} cannot be rebuilt",
            where=_place(layer.mask),
            hint="AttachMask gives every Attention a mask that can",
        )


def _check_projections(layer: Layer, reach: _Reach) -> None:
    """The layer after a cut can be asked before it runs if all it projects follows from there."""
    for value in (layer.query, layer.key):
        if value.producer() not in reach.nodes:
            raise AnalysisError(
                f"layer {layer.index}: {value.name!r} is not computed from the stream that enters",
                where=_place(value),
                hint="use score: {from: previous}",
            )


def _place(value: ir.Value) -> str:
    node = value.producer()
    return f"node {node.name!r} ({node.op_type})" if node is not None else "graph input"


def _attended(layer: Layer, following: Layer, labels: Labels) -> ir.Value:
    """The stream between attention and MLP of ``layer``: what everything that enters it joins.

    Found as the first value behind its attention without which nothing of what enters reaches the
    ``following`` attention.
    """
    for value in _behind(layer, following):
        if value is following.entry:
            break
        if not _reaches(layer.entry, following.attention, labels, but=value):
            return value
    raise AnalysisError(
        f"layer {layer.index}: no single stream of tokens leads from its attention to its MLP",
        where=_place(layer.attention.outputs[0]),
        hint="use drop_point: between",
    )


def _behind(layer: Layer, following: Layer) -> Iterator[ir.Value]:
    """Values computed from the attention of ``layer`` that ``following`` needs, in order."""
    needed = ancestors([following.query, following.key])
    graph = layer.attention.graph
    assert graph is not None
    behind = {layer.attention}
    for node in graph:
        if node in needed and any(v is not None and v.producer() in behind for v in node.inputs):
            behind.add(node)
            yield from node.outputs


def _reaches(entry: ir.Value, end: ir.Node, labels: Labels, but: ir.Value) -> bool:
    """Whether tokens of ``entry`` come to ``end`` without passing through ``but``."""
    seen: set[ir.Node] = set()
    stack = [entry]
    while stack:
        for use in stack.pop().uses():
            if use.node is end:
                return True
            if use.node in seen or ops.is_mask(use.node):
                continue
            seen.add(use.node)
            carried = (v for v in use.node.outputs if v is not but and labels.get(v, NONE))
            stack.extend(carried)
    return False


def _mixed(layer: Layer, labels: Labels) -> ir.Value:
    """Attention·V of ``layer`` as [B,S,H·d]: what its output projection reads."""
    value = layer.attention.outputs[0]
    while len(value.shape or ()) != 3 or labels.get(value, NONE).token != 1:
        users = [use.node for use in value.uses()]
        if len(users) != 1 or users[0].op_type not in ("Transpose", "Reshape"):
            raise AnalysisError(
                f"layer {layer.index}: what follows attention·V is no plain reshape",
                where=f"value {value.name!r}",
                hint="use drop_point: between",
            )
        value = users[0].outputs[0]
    return value


def _live_outs(
    layer: int, reach: _Reach, labels: Labels
) -> tuple[tuple[Stream, ...], tuple[ir.Value, ...]]:
    streams: dict[ir.Value, Stream] = {}
    masks: dict[ir.Value, None] = {}
    for value in reach.read:
        axes = labels.get(value, NONE)
        if not axes:
            continue
        _check(layer, reach.entry, value, axes)
        if axes.key is not None:
            masks[value] = None
        elif axes.token is not None:
            streams[value] = Stream(value, axes.token)
    order = sorted(streams.values(), key=lambda stream: stream.value.name or "")
    return tuple(order), tuple(masks)


def _check(layer: int, entry: ir.Value, value: ir.Value, axes: Axes) -> None:
    producer = value.producer()
    rebuilt = producer is not None and ops.is_mask(producer)
    kind = axes.state
    if axes.key is not None and not rebuilt:
        kind = "keys of an earlier length"
    elif axes.token not in (None, 1) and rank(value) is None:
        kind = "of unknown rank"
    elif axes.key is None and not _has_rows(value, entry, axes):
        kind = "the rows of a batch share it"
    if kind:
        raise AnalysisError(
            f"layer {layer}: the value {value.name!r} crosses the cut and cannot be narrowed "
            f"({kind})",
            where=_place(value),
            hint="vtr inspect shows the trail of token axes",
        )


def _has_rows(value: ir.Value, entry: ir.Value, axes: Axes) -> bool:
    """Whether the first axis of ``value`` may be that of the batch, so that rows can differ."""
    first = value.shape[0] if value.shape else None
    batch = entry.shape[0] if entry.shape else None
    return axes.token != 0 and (not isinstance(first, int) or first == batch)
