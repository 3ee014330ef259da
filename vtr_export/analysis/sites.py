"""Where a schedule's cuts go in a graph, and which values cross them."""

from dataclasses import dataclass

import onnx_ir as ir

from vtr_export import ops
from vtr_export.analysis.axes import NONE, Axes, Labels
from vtr_export.analysis.layers import Layer, descendants
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
    return [_find(layers, labels, schedule, cut) for cut in schedule.cuts]


def _find(layers: list[Layer], labels: Labels, schedule: Resolved, cut: Cut) -> Site:
    layer = cut.before_layer
    scored = layers[layer - 1 if schedule.source == "previous" else layer]
    if schedule.drop_point == "inside":
        entry = _attended(layers[layer - 1], labels)
    else:
        entry = layers[layer].entry
    after = frozenset(node for node in descendants(entry) if not _is_mask(node))
    streams, masks = _live_outs(layer, entry, after, labels)
    return Site(cut, scored, entry, after, streams, masks)


def _attended(layer: Layer, labels: Labels) -> ir.Value:
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
    layer: int, entry: ir.Value, after: frozenset[ir.Node], labels: Labels
) -> tuple[tuple[Stream, ...], tuple[ir.Value, ...]]:
    streams: dict[ir.Value, Stream] = {}
    masks: dict[ir.Value, None] = {}
    for node in after:
        for value in node.inputs:
            if value is None or value is entry or value.producer() in after:
                continue
            axes = labels.get(value, NONE)
            if not axes:
                continue
            _check(layer, value, axes)
            if axes.key is not None:
                masks[value] = None
            elif axes.token is not None:
                streams[value] = Stream(value, axes.token)
    order = sorted(streams.values(), key=lambda stream: stream.value.name or "")
    return tuple(order), tuple(masks)


def _is_mask(node: ir.Node) -> bool:
    return node.op_type == "VtrCausalMask" and node.domain == ops.DOMAIN


def _check(layer: int, value: ir.Value, axes: Axes) -> None:
    producer = value.producer()
    rebuilt = producer is not None and _is_mask(producer)
    if axes.state or (axes.key is not None and not rebuilt):
        kind = axes.state or "keys of an earlier length"
        raise AnalysisError(
            f"layer {layer}: the value {value.name!r} crosses the cut and cannot be narrowed "
            f"({kind})",
            where=f"node {producer.name!r} ({producer.op_type})" if producer else "graph input",
            hint="vtr inspect shows the trail of token axes",
        )
