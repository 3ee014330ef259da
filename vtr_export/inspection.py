"""What an ONNX file or an artifact is made of: layers, token streams, cuts, and what is opaque."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it ships no types

from vtr_export.analysis import Axes, Layer, find_layers, find_sites, label_axes, token_seeds
from vtr_export.analysis.attentions import Attention, find_attentions
from vtr_export.analysis.axes import NONE, OPAQUE
from vtr_export.analysis.boundaries import Boundary, find_boundaries
from vtr_export.analysis.layers import descendants
from vtr_export.errors import AnalysisError, InputError
from vtr_export.graph_facts import (
    Crossing,
    CutFound,
    GraphFacts,
    LayerFound,
    Lost,
    MaskFound,
    StageFound,
    StreamFound,
    Tensor,
)
from vtr_export.manifest import Manifest
from vtr_export.ops import RATER_RECYCLE, RECYCLE, THRESHOLD, is_cut
from vtr_export.passes.infer_shapes import InferShapes
from vtr_export.schedule import Cut, Keep, Resolved

NARROW = "VtrNarrow"
WORDS = {"token": "tokens", "key": "keys", "vision": "vision keys", "vision_key": "all vision keys"}
MAX_TRAIL = 12
OTHER_FORM = "; vtr export --onnx brings decoders of other exporters into the form that is cut"


def inspect_path(path: Path, layer: int | None = None) -> tuple[Manifest | None, list[GraphFacts]]:
    """The graphs of an artifact (with its manifest), or one ONNX file.

    ``layer``: also what a cut before it would narrow; AnalysisError when it cannot be made.
    Raises ArtifactError for a damaged artifact, InputError for a file that is no valid ONNX.
    """
    if not path.is_dir():
        return None, [inspect_file(path, layer)]
    manifest = Manifest.load(path)
    files = [path / name for name in manifest.graphs.model_dump().values() if name is not None]
    decoder = path / manifest.graphs.decoder
    return manifest, [inspect_file(file, layer if file == decoder else None) for file in files]


def inspect_file(file: Path, layer: int | None = None) -> GraphFacts:
    """One ONNX file, checked before it is read further; its weights are not read."""
    model = _load(file)
    try:
        return _facts(file, model, layer)
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise AnalysisError(
            f"the analysis cannot follow the graph ({type(error).__name__}: {error})",
            where=str(file),
            hint="onnx.checker.check_model(path, full_check=True) may say what contradicts itself",
        ) from error


def _facts(file: Path, model: ir.Model, layer: int | None) -> GraphFacts:
    graph = model.graph
    attentions = find_attentions(graph)
    if any(None in (each.heads, each.kv_heads) for each in attentions):
        InferShapes()(model)
        attentions = find_attentions(graph)
    labels = label_axes(graph, token_seeds(graph))
    boundaries = find_boundaries(graph, attentions, labels)
    layers, why = _layers(graph, labels)
    cuts = tuple(_cuts(graph, attentions))
    return GraphFacts(
        file=str(file),
        producer=f"{model.producer_name or 'unknown'} {model.producer_version or ''}".strip(),
        opset=model.opset_imports.get(""),
        nodes=len(graph),
        inputs=tuple(_tensor(value, labels) for value in graph.inputs),
        outputs=tuple(_tensor(value, labels) for value in graph.outputs),
        layers=tuple(_each_layer(graph, attentions, boundaries, labels)),
        streams=tuple(_streams(boundaries, labels)),
        stages=tuple(_stages(len(attentions), cuts)),
        masks=tuple(_masks(attentions)),
        why_no_cuts=why,
        cuts=cuts,
        lost=tuple(_lost(graph, labels)),
        crossing=None if layer is None else _crossing(graph, layers, labels, layer, why),
    )


def _load(file: Path) -> ir.Model:
    """A model that ``onnx.checker`` accepts. Weights outside the file may be missing."""
    try:
        proto = onnx.load(str(file), load_external_data=False)
        onnx.checker.check_model(_without_external(proto))
        return ir.serde.deserialize_model(proto)
    except OSError as error:
        reason = error.strerror or str(error)
    except DecodeError:
        reason = "it is no ONNX model"
    except (onnx.checker.ValidationError, ir.serde.SerdeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
    raise InputError(
        f"cannot read the graph: {reason}", where=str(file), hint="give an ONNX file or an artifact"
    )


def _without_external(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model, its external initializers made inputs: the checker then needs no other file."""
    if all(each.data_location != onnx.TensorProto.EXTERNAL for each in proto.graph.initializer):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    kept = []
    known = {value.name for value in copy.graph.input}
    for tensor in copy.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            kept.append(tensor)
        elif tensor.name not in known:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            copy.graph.input.append(info)
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return copy


def _layers(graph: ir.Graph, labels: Mapping[ir.Value, Axes]) -> tuple[list[Layer], str]:
    """The layers as a cut needs them, or why it cannot be made as the graph stands."""
    if not any(value.name == "inputs_embeds" for value in graph.inputs):
        return [], f"no input is called inputs_embeds{OTHER_FORM}"
    try:
        layers = find_layers(graph, labels)
    except AnalysisError as error:
        return [], " ".join(part for part in (error.message, error.where) if part)
    return layers, "" if layers else f"no Attention reads a value with a token axis{OTHER_FORM}"


def _each_layer(
    graph: ir.Graph,
    attentions: Sequence[Attention],
    boundaries: Sequence[Boundary],
    labels: Mapping[ir.Value, Axes],
) -> Iterator[LayerFound]:
    """All that is said of each attention."""
    inputs = {value.name: value for value in graph.inputs}
    first = inputs.get("inputs_embeds", inputs.get("input_ids"))
    entries = [first, *(boundary.entry for boundary in boundaries)]
    for index, (found, entry) in enumerate(zip(attentions, entries, strict=False)):
        keys = labels.get(found.key, NONE) if found.key is not None else NONE
        yield LayerFound(
            index=index,
            attention=found.kind if keys.vision_key is None else "cross",
            heads=found.heads,
            kv_heads=found.kv_heads,
            entry=_name(entry) or None,
            node=found.last.name or "",
            past_key=_name(found.past) or None,
            masks=tuple(_name(mask) for mask in found.masks),
            traits=found.traits,
        )


def _streams(
    boundaries: Sequence[Boundary], labels: Mapping[ir.Value, Axes]
) -> Iterator[StreamFound]:
    """Residual streams first, then what else crosses, in the order of its name."""
    crossed: dict[ir.Value, list[int]] = {}
    for boundary in boundaries:
        if boundary.entry is not None:
            axes = labels.get(boundary.entry, NONE)
            yield StreamFound(_name(boundary.entry), axes.token, "residual", (boundary.layer,))
        for value in boundary.others:
            crossed.setdefault(value, []).append(boundary.layer)
    for value in sorted(crossed, key=_name):
        axes, layers = labels.get(value, NONE), tuple(crossed[value])
        vision = axes.vision if axes.vision_key is None else axes.vision_key
        if vision is not None:
            yield StreamFound(_name(value), vision, "vision keys", layers)
        elif axes.key is not None:
            yield StreamFound(_name(value), axes.key, "keys", layers)
        elif axes.token is not None:
            yield StreamFound(_name(value), axes.token, "tokens", layers)
        else:
            yield StreamFound(_name(value), None, "lost", layers)


def _stages(layers: int, cuts: Sequence[CutFound]) -> Iterator[StageFound]:
    """One more than cuts."""
    keeps = {0: "all"}
    keeps |= {cut.before_layer: cut.keep for cut in cuts if cut.before_layer is not None}
    firsts = [*keeps, layers]
    for first, following in pairwise(firsts if layers else ()):
        yield StageFound(first, following - first, keeps[first])


def _masks(attentions: Sequence[Attention]) -> Iterator[MaskFound]:
    readers: dict[ir.Value, list[int]] = {}
    for index, found in enumerate(attentions):
        for mask in found.masks:
            readers.setdefault(mask, []).append(index)
    for mask, layers in readers.items():
        producer = mask.producer()
        made = "input" if producer is None else _operator(producer)
        yield MaskFound(_name(mask), made, _shape(mask), tuple(layers))


def _cuts(graph: ir.Graph, attentions: Sequence[Attention]) -> list[CutFound]:
    """Every prune node, from shallow to deep."""
    found = []
    for node in graph:
        if not is_cut(node) or len(node.outputs) < 2:
            continue
        after = descendants(node.outputs[0])
        deeper = (index for index, each in enumerate(attentions) if each.last in after)
        narrowed = [use.node for use in node.outputs[1].uses() if use.node.op_type == NARROW]
        streams = tuple(sorted(_name(each.inputs[0]) for each in narrowed))
        found.append(CutFound(next(deeper, None), node.name or "", _keep(node), streams))
    return found


def _keep(node: ir.Node) -> str:
    """``4 of 16 tokens`` from the budget's constants, or the input that says it."""
    width = node.inputs[4] if len(node.inputs) > 4 else None
    budget = width.producer() if width is not None else None
    if budget is None or budget.op_type != "VtrBudget" or len(budget.inputs) < 3:
        return "unknown"
    numerator, per = (_integer(value) for value in budget.inputs[1:3])
    most = "at most " if node.op_type == THRESHOLD else ""
    rest = " and clusters of the rest" if node.op_type in (RECYCLE, RATER_RECYCLE) else ""
    return f"{most}{'as the input keep says' if numerator is None else numerator} of {per}{rest}"


def _integer(value: ir.Value | None) -> int | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return int(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size else None


def _lost(graph: ir.Graph, labels: Mapping[ir.Value, Axes]) -> list[Lost]:
    """The nodes at which tokens were lost first; what follows from them is not repeated."""
    lost = []
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if any(labels.get(value, NONE).state == OPAQUE for value in inputs):
            continue
        for value in node.outputs:
            if labels.get(value, NONE).state == OPAQUE:
                said = tuple(f"{_name(each)}: {_axes(labels.get(each, NONE))}" for each in inputs)
                trail = _trail(value, labels)
                lost.append(Lost(_name(value), node.name or "", _operator(node), said, trail))
    return lost


def _trail(value: ir.Value, labels: Mapping[ir.Value, Axes]) -> tuple[str, ...]:
    """The shortest way from an input with a token axis to ``value``, in value names."""
    before: dict[ir.Value, ir.Value | None] = {value: None}
    queue = deque([value])
    while queue:
        current = queue.popleft()
        producer = current.producer()
        if producer is None:
            return _forwards(current, before)
        for each in producer.inputs:
            if each is not None and each in labels and each not in before:
                before[each] = current
                queue.append(each)
    return (_name(value),)


def _forwards(start: ir.Value, before: Mapping[ir.Value, ir.Value | None]) -> tuple[str, ...]:
    names, value = [], before[start]
    names.append(_name(start))
    while value is not None:
        names.append(_name(value))
        value = before[value]
    if len(names) <= MAX_TRAIL:
        return tuple(names)
    half = MAX_TRAIL // 2
    return (*names[:half], f"… {len(names) - MAX_TRAIL} more …", *names[-half:])


def _crossing(
    graph: ir.Graph, layers: list[Layer], labels: Mapping[ir.Value, Axes], layer: int, why: str
) -> Crossing:
    if any(is_cut(node) for node in graph):
        why = "the graph has cuts already"
    if any(each.crosses for each in layers):
        why = why or "images are keys of its cross-attention, and no tokens cross"
    if why:
        raise AnalysisError(f"no cut can be made: {why}", hint="vtr inspect without --layer")
    if not 0 < layer < len(layers):
        raise InputError(
            f"layer is {layer}, but the graph has {len(layers)} layers",
            hint=f"a cut comes before one of the layers 1 to {len(layers) - 1}",
        )
    schedule = Resolved(len(layers), None, (Cut(layer, Keep(1, 2)),))
    site = find_sites(layers, labels, schedule)[0]
    streams = tuple(_name(stream.value) for stream in site.streams)
    return Crossing(layer, _name(site.entry), streams, tuple(_name(mask) for mask in site.masks))


def _tensor(value: ir.Value, labels: Mapping[ir.Value, Axes]) -> Tensor:
    dtype = str(value.dtype).lower() if value.dtype is not None else "?"
    axes = labels.get(value, NONE)
    return Tensor(_name(value), dtype, _shape(value), _axes(axes) if axes else "")


def _shape(value: ir.Value) -> str:
    return str(value.shape).replace(",", ", ") if value.shape is not None else "?"


def _axes(axes: Axes) -> str:
    """``tokens on axis 1``."""
    said = [f"{WORDS[what]} on axis {axis}" for what, axis in axes.named.items()]
    return ", ".join(said) or axes.state or "no tokens"


def _operator(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _name(value: ir.Value | None) -> str:
    return value.name or "" if value is not None else ""
