"""What flows from layer to layer: the stream that enters each, and all else that has tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from vtr_export import ops
from vtr_export.analysis.attentions import Attention
from vtr_export.analysis.axes import LENGTH, NONE, Axes, Labels
from vtr_export.analysis.layers import descendants, order_of, residual
from vtr_export.errors import AnalysisError


@dataclass(frozen=True)
class Boundary:
    """Between two layers: ``entry`` goes through it (None: no single value does), and ``others``.

    ``others`` are values made before that nodes behind read, where tokens went in.
    """

    layer: int
    entry: ir.Value | None
    others: tuple[ir.Value, ...]


def find_boundaries(
    graph: ir.Graph, attentions: Sequence[Attention], labels: Labels
) -> list[Boundary]:
    """One before each layer but the first."""
    found, order = [], order_of(graph)
    for number, (before, after) in enumerate(pairwise(attentions), start=1):
        entry = _entry(graph, before.last, after.first, order)
        others = () if entry is None else _others(entry, labels)
        found.append(Boundary(number, entry, others))
    return found


def _entry(
    graph: ir.Graph, before: ir.Node, after: ir.Node, order: Mapping[ir.Node, int]
) -> ir.Value | None:
    try:
        return residual(graph, before, after, order)
    except AnalysisError:
        return None


def _others(entry: ir.Value, labels: Labels) -> tuple[ir.Value, ...]:
    behind = descendants(entry)
    crossing: dict[ir.Value, None] = {}
    for node in behind:
        if ops.is_mask(node):  # made anew from a stage's own padding
            continue
        for value in node.inputs:
            if value is None or value is entry or value.producer() in behind:
                continue
            axes: Axes = labels.get(value, NONE)
            if axes and axes.state != LENGTH:
                crossing[value] = None
    return tuple(sorted(crossing, key=lambda value: value.name or ""))
