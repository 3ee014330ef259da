"""Which layer deviates first: the residual stream, tapped before every layer."""

from itertools import pairwise

import numpy as np
import onnx_ir as ir

from vtr_export.analysis.layers import residual
from vtr_export.errors import AnalysisError
from vtr_export.verify.case import Array
from vtr_export.verify.gates import Bars
from vtr_export.verify.play import Inputs, forced_passes, prefill_feeds
from vtr_export.verify.sessions import Parts

NORMS = ("RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization")


class TapLayers(ir.passes.InPlacePass):
    """Show the last row of what enters each layer but the first, and of what leaves the last.

    Before::

        logits = …

    After::

        stream.1 = Gather(residual before layer 1, -1), …     # outputs [B, D]

    For a decoder whose keep-sets are forced: elsewhere scores branch off between the layers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find every stream first, then add the outputs."""
        graph = model.graph
        sites = [node for node in graph if node.op_type == "Attention"]
        streams = [residual(graph, before, after) for before, after in pairwise(sites)]
        final = [node.inputs[0] for node in graph if node.op_type in NORMS][-1:]
        for number, value in enumerate([*streams, *final], start=1):
            assert value is not None
            _tap(graph, value, number)
        return ir.passes.PassResult(model, modified=bool(sites))


def _tap(graph: ir.Graph, value: ir.Value, number: int) -> None:
    index = ir.tensor(-1, dtype=ir.DataType.INT64, name=f"stream.{number}.index")
    last = ir.Node("", "Constant", [], [ir.AttrTensor("value", index)])
    gather = ir.Node("", "Gather", [value, last.outputs[0]], [ir.AttrInt64("axis", 1)])
    last.outputs[0].name = index.name
    last.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    tapped = gather.outputs[0]
    tapped.name, tapped.type = f"stream.{number}", value.type
    tapped.shape = ir.Shape(["batch", None])
    graph.extend([last, gather])
    graph.outputs.append(tapped)


def first_deviation(parts: Parts, inputs: Inputs, bars: Bars) -> str:
    """A sentence that names the first layer whose output is not the reference's."""
    trace = inputs.case.trace
    if trace is None:
        return ""
    try:
        session = parts.open(parts.decoder, (*forced_passes(), TapLayers()))
    except AnalysisError as error:
        return f"the layers could not be told apart: {error.message}"
    names = sorted((n for n in session.outputs if n.startswith("stream.")), key=_number)
    results = session.run(prefill_feeds(parts, inputs, session), names)
    actual = [inputs.embeds[:, -1], *(np.asarray(results[name]) for name in names)]
    return _blame(actual, list(trace.streams[: len(actual)]), bars.stream)


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])


def _blame(actual: list[Array], expected: list[Array], limit: float) -> str:
    """Stream ``n`` is the input of layer ``n``: what it shows first was done by layer ``n - 1``."""
    errors = [_relative(mine, theirs) for mine, theirs in zip(actual, expected, strict=True)]
    for number, error in enumerate(errors):
        if not np.isfinite(error):
            return f"{_named(number)} is the first to give infinity or NaN"
        if error > limit:
            before = f", {errors[number - 1]:.1e} before it" if number else ""
            return f"{_named(number)} deviates first (relative error {error:.1e}{before})"
    worst = max(errors)
    if worst < limit / 30:
        return (
            f"every layer agrees (relative error {worst:.1e}), but not the final norm or the head"
        )
    growth = [after / max(before, 1e-7) for before, after in pairwise(errors)]
    number = 1 + int(np.argmax(growth))
    return f"{_named(number)} deviates most (relative error {errors[number]:.1e})"


def _named(number: int) -> str:
    return f"layer {number - 1}" if number else "the embedding of the last token"


def _relative(actual: Array, expected: Array) -> float:
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    norm = np.linalg.norm(b, axis=-1)
    with np.errstate(all="ignore"):
        return float(np.max(np.linalg.norm(a - b, axis=-1) / np.maximum(norm, 1e-30)))
