"""Which tensor of a graph leaves the range of its dtype first."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from vtr_export.errors import AnalysisError, ArtifactError, UnavailableError
from vtr_export.manifest import Manifest
from vtr_export.passes.widen import FLOAT, ROUNDED, SUFFIXES, TYPED
from vtr_export.runtime.session import Value
from vtr_export.verify.case import Case
from vtr_export.verify.play import (
    Inputs,
    call_name,
    embed,
    embed_case,
    encode,
    encode_case,
    forced_passes,
    open_decoder,
    play,
)
from vtr_export.verify.sessions import Forced, GraphError, Parts

SHOWN = "range."
DTYPES: Final = {
    ir.DataType.FLOAT16: ("fp16", np.dtype(np.float16), 65504.0),
    ir.DataType.BFLOAT16: ("bf16", np.dtype(ml_dtypes.bfloat16), 3.38953e38),
}


@dataclass(frozen=True)
class Range:
    """The sum and the largest of a tensor's magnitudes; -inf is the largest of none."""

    sum: float = 0.0
    largest: float = 0.0

    @property
    def nan(self) -> bool:
        """Whether it holds NaN; ONNX Runtime's maximum passes over it."""
        return math.isnan(self.sum)

    @property
    def inf(self) -> bool:
        """Whether it holds an infinity."""
        return self.largest == math.inf


class ShowRanges(ir.passes.InPlacePass):
    """Show the range of every fp32 value of a graph; typed ones are to be widened before.

    Before::

        y = MatMul(x, weight)

    After::

        y = MatMul(x, weight)
        range.sum.N, range.largest.N = ReduceSum(Abs(y)), ReduceMax(Abs(y))     # outputs []

    ``values[N]`` is then the value of that number, in ``graph``.
    """

    graph: ir.Graph
    values: Sequence[ir.Value] = ()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """A cast is shown by what goes into it; that of a weight, which is typed, by itself."""
        ShapeInferencePass(data_prop=False)(model)
        graph = model.graph
        made = [value for node in graph for value in node.outputs]
        values = [
            value
            for value in (*graph.inputs, *graph.initializers.values(), *made)
            if value.dtype == ir.DataType.FLOAT and _source(value) is value
        ]
        for number, value in enumerate(values):
            magnitude = ir.Node("", "Abs", [value])
            graph.append(magnitude)
            for op, name in (("ReduceSum", "sum"), ("ReduceMax", "largest")):
                show = ir.Node("", op, magnitude.outputs, [ir.AttrInt64("keepdims", 0)])
                show.outputs[0].name = f"{SHOWN}{name}.{number}"
                show.outputs[0].type, show.outputs[0].shape = FLOAT, ir.Shape([])
                graph.append(show)
                graph.outputs.append(show.outputs[0])
        self.graph, self.values = graph, values
        return ir.passes.PassResult(model, modified=bool(values))


class _BeyondError(Exception):
    """A tensor left its range."""


class Watched:
    """A session that raises _BeyondError at the first tensor out of its range."""

    def __init__(self, parts: Parts, file: Path, passes: Sequence[ir.passes.PassBase] = ()) -> None:
        self._show = ShowRanges()
        self._session = parts.open(file, passes, then=(self._show,))
        self.inputs, outputs = self._session.inputs, self._session.outputs
        self._extra = [name for name in outputs if name.startswith(SHOWN)]
        self.outputs = {name: port for name, port in outputs.items() if name not in self._extra}

    def run(
        self,
        feeds: Mapping[str, Value],
        outputs: Sequence[str] | None = None,
        *,
        resident: Collection[str] = (),
    ) -> dict[str, Value]:
        """See :class:`Session`."""
        names = list(self.outputs) if outputs is None else list(outputs)
        results = self._session.run(feeds, [*names, *self._extra], resident=resident)
        shown = {name: float(np.asarray(results.pop(name))) for name in self._extra}
        ranges = {
            value: Range(shown[f"{SHOWN}sum.{number}"], shown[f"{SHOWN}largest.{number}"])
            for number, value in enumerate(self._show.values)
        }
        found = first_beyond(self._show.graph, ranges)
        if found:
            raise _BeyondError(found)
        return results


def check_range(folder: str | Path) -> str:
    """A sentence on the first tensor of an artifact that leaves the range of its dtype, or "".

    Replays ``golden/`` in ONNX Runtime on a CPU, typed graphs as their fp32 twins. Raises
    UnavailableError without onnxruntime, ArtifactError for an artifact without golden vectors.
    """
    from vtr_export.verify.golden import FOLDER, load_golden  # which compares, and so comes here

    folder = Path(folder)
    if find_spec("onnxruntime") is None:
        message = "checking the range needs onnxruntime, which is not installed"
        raise UnavailableError(message, hint="pip install 'vtr-export[cpu]'")
    manifest = Manifest.load(folder)
    files = sorted(name for name in manifest.files if name.startswith(f"{FOLDER}/"))
    if not files:
        hint = "export it verified and whole (--verify all)"
        raise ArtifactError("no golden vectors to check it with", where=str(folder), hint=hint)
    parts, cases = Parts.of(folder, manifest), [load_golden(folder / name) for name in files]
    if said := beyond_in_features(parts, cases):
        return said
    inputs = embed(parts, cases, encode(parts, cases))
    return beyond_in_embeddings(parts, inputs) or beyond_in_decoder(parts, inputs)


def beyond_in_features(parts: Parts, cases: Sequence[Case]) -> str:
    """A sentence on the vision encoder's first tensor out of range; empty if none is."""

    def look() -> None:
        session = Watched(parts, parts.vision)
        for case in cases:
            with _during(lambda case: f"the image features of {case.question.name}", case):
                encode_case(session, case)

    return _spoken(look)


def beyond_in_embeddings(parts: Parts, inputs: Sequence[Inputs]) -> str:
    """The same of the embedding table."""

    def look() -> None:
        session = Watched(parts, parts.embedding)
        for each in inputs:
            with _during(lambda case: f"the embeddings of {case.question.name}", each.case):
                embed_case(session, each.case, each.features, beside=parts.beside)

    return _spoken(look)


def beyond_in_decoder(parts: Parts, inputs: Sequence[Inputs]) -> str:
    """The same of the decoder with the reference's keep-sets."""

    def look() -> None:
        forced = Forced(Watched(parts, parts.decoder, forced_passes()))
        decoder = open_decoder(parts, forced)
        for each in inputs:
            with _during(lambda case: call_name(len(forced.shown), case), each.case):
                play(decoder, each, forced)

    return _spoken(look)


def _spoken(look: Callable[[], None]) -> str:
    try:
        look()
    except _BeyondError as found:
        return f"{found}{''.join(found.__notes__)}"
    except (AnalysisError, GraphError) as error:
        return f"tensors could not be watched: {error}"
    return ""


@contextmanager
def _during(call: Callable[[Case], str], case: Case) -> Iterator[None]:
    try:
        yield
    except _BeyondError as found:
        found.add_note(f", in {call(case)}")
        raise


def first_beyond(graph: ir.Graph, ranges: Mapping[ir.Value, Range]) -> str:
    """What the first node did, in the graph's order, that made NaN or infinity of finite values.

    Empty if none did. An infinity alone in its tensor is what masks are filled with: no news.
    """
    layer = ""
    for node in graph:
        layer = _layer(node, layer)
        if said := _rounding(node, ranges, layer) or _arising(node, ranges, layer):
            return said
    return ""


def _rounding(node: ir.Node, ranges: Mapping[ir.Value, Range], layer: str) -> str:
    """A cast whose result is infinite where what it rounds is not."""
    result = node.outputs[0]
    if not _casts(node) or result.dtype not in DTYPES or _is_stored(result):
        return ""
    (source,) = _sources(node)
    found = ranges.get(source, Range())
    name, dtype, limit = DTYPES[result.dtype]
    with np.errstate(over="ignore"):
        if found.nan or found.inf or np.isfinite(np.float32(max(found.largest, 0)).astype(dtype)):
            return ""  # NaN and infinities have another origin
    maker = source.producer() if (result.name or "").endswith(ROUNDED) else node
    return (
        f"{_plain(result)!r} ({_op(maker)}{layer}) is the first to leave the range of {name}: "
        f"{found.largest:.6g} is beyond {limit:.6g}"
    )


def _arising(node: ir.Node, ranges: Mapping[ir.Value, Range], layer: str) -> str:
    """NaN or infinity that no computed input explains, and the weight that does, if one does."""
    if _casts(node):
        return ""
    found = [ranges[value] for value in node.outputs if value in ranges]
    for kind, word in (("nan", "NaN"), ("inf", "infinity")):
        holders = [v for v in _sources(node) if v in ranges and getattr(ranges[v], kind)]
        stored = [v for v in holders if _is_stored(v) and not (kind == "inf" and _is_fill(v))]
        if not any(getattr(each, kind) for each in found) or len(stored) < len(holders):
            continue
        if stored:
            return f"the weight {_plain(stored[0])!r} holds {word} ({_op(node)}{layer} reads it)"
        return f"{_plain(node.outputs[0])!r} ({_op(node)}{layer}) is the first to hold {word}"
    return ""


def _layer(node: ir.Node, before: str) -> str:
    """Where a node stands: that of the weights it reads, or of those read ``before``."""
    if _casts(node):
        return before
    names = [_plain(value) for value in _sources(node) if _is_stored(value)]
    for name in names:
        if found := re.search(r"\blayers\.(\d+)\.", name):
            return f", layer {found[1]}"
    return "" if any(name.endswith((".weight", ".bias")) for name in names) else before


def _sources(node: ir.Node) -> list[ir.Value]:
    return [_source(value) for value in node.inputs if value is not None]


def _source(value: ir.Value) -> ir.Value:
    """What computed casts round or widen; of a typed weight its fp32 value."""
    node = value.producer()
    if node is None or not _casts(node) or (given := node.inputs[0]) is None or _is_stored(given):
        return value
    return _source(given)


def _casts(node: ir.Node) -> bool:
    """True for a cast between floats."""
    kinds = (*TYPED, ir.DataType.FLOAT)
    ends = (*node.inputs, *node.outputs)
    return node.op_type == "Cast" and all(v is not None and v.dtype in kinds for v in ends)


def _is_stored(value: ir.Value) -> bool:
    """A weight or a constant, cast or not."""
    node = value.producer()
    if node is None:
        return value.is_initializer()
    if _casts(node) and node.inputs[0] is not None:
        return _is_stored(node.inputs[0])
    return node.op_type == "Constant"


def _is_fill(value: ir.Value) -> bool:
    return value.shape is not None and all(size == 1 for size in value.shape)


def _op(node: ir.Node | None) -> str:
    return "input" if node is None else f"{node.op_type} {node.name!r}"


def _plain(value: ir.Value) -> str:
    """The name it has in the graph that was widened."""
    name = value.name or ""
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name
