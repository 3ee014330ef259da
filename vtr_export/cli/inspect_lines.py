"""What is found in a graph, as lines for people."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vtr_export.cli.output import columns

if TYPE_CHECKING:
    from vtr_export.graph_facts import GraphFacts

UNKNOWN = "?"


def graph_lines(graph: "GraphFacts") -> Iterator[str]:
    """Inputs, outputs, layers, streams, masks, stages, cuts, and where tokens are lost."""
    yield f"{graph.file}: opset {graph.opset}, {graph.nodes} nodes, by {graph.producer}"
    for what, tensors in (("in", graph.inputs), ("out", graph.outputs)):
        yield from columns([(what, t.name, t.dtype, t.shape, t.axes) for t in tensors])
    yield from _layer_lines(graph)
    yield from _stream_lines(graph)
    for cut in graph.cuts:
        streams = ", ".join(cut.streams)
        yield f"cut before layer {cut.before_layer}: keeps {cut.keep}, narrows {streams}"
    if graph.why_no_cuts:
        yield f"no cut can be made as it stands: {graph.why_no_cuts}"
    if graph.crossing is not None:
        crossing = graph.crossing
        yield f"a cut before layer {crossing.before_layer} would narrow:"
        yield f"  {crossing.entry} (by score)"
        yield from (f"  {name}" for name in crossing.streams)
        yield from (f"  {name} (mask, made again)" for name in crossing.masks)
    for lost in graph.lost:
        yield f"tokens are lost at {lost.operator} {lost.node!r}: {'; '.join(lost.inputs)}"
        yield f"  trail: {' > '.join(lost.trail)}"


def _layer_lines(graph: "GraphFacts") -> Iterator[str]:
    """One line a layer."""
    if not graph.layers:
        yield "layers: no attention was found"
        return
    rows = [("", "attention", "heads", "entered by", "past", "mask", "")]
    for layer in graph.layers:
        heads = f"{layer.heads or UNKNOWN} on {layer.kv_heads or UNKNOWN}"
        masks = ", ".join(layer.masks) or "none"
        rows.append(
            (f"layer {layer.index}", layer.attention, heads, layer.entry or UNKNOWN,
             layer.past_key or "none", masks, ", ".join(layer.traits))
        )  # fmt: skip
    yield from columns(rows)


def _stream_lines(graph: "GraphFacts") -> Iterator[str]:
    """Everything that crosses, but residual streams: those stand beside their layers."""
    rows = []
    for stream in graph.streams:
        if stream.kind != "residual":
            axis = "cannot be followed" if stream.axis is None else f"axis {stream.axis}"
            rows.append(
                ("stream", stream.name, stream.kind, axis, f"layers {_span(stream.layers)}")
            )
    yield from columns(rows)
    yield from columns(
        [("mask", m.name, m.made_by, m.shape, f"layers {_span(m.layers)}") for m in graph.masks]
    )
    yield from columns(
        [
            ("stage", f"layers {_span(range(s.first_layer, s.first_layer + s.layers))}", s.keep)
            for s in graph.stages
        ]
    )


def _span(numbers: Sequence[int]) -> str:
    """``1 to 31``, or each of them."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and last - first + 1 == len(numbers):
        return f"{first} to {last}"
    return ", ".join(map(str, numbers))
