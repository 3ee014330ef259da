"""A foreign decoder in the form that cuts are made for, and what the original calls its cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx_ir as ir
import onnx_ir.passes.common as common

from vtr_export.analysis.forms import Form, find_forms
from vtr_export.analysis.forms.form import LAYOUT, cache_input
from vtr_export.analysis.layers import ancestors
from vtr_export.compile import run
from vtr_export.errors import AnalysisError, InputError
from vtr_export.passes.attach_mask import AttachMask
from vtr_export.passes.canonical_attention import CanonicalAttention
from vtr_export.passes.fix_reshapes import FixReshapes
from vtr_export.passes.infer_shapes import InferShapes
from vtr_export.passes.lift_embeddings import LIFTED, LiftEmbeddings
from vtr_export.passes.name_caches import NameCaches
from vtr_export.passes.name_inputs import NameInputs
from vtr_export.passes.narrow_shapes import NarrowShapes
from vtr_export.passes.plain_reshapes import PlainReshapes
from vtr_export.passes.raise_opset import RaiseOpset
from vtr_export.passes.unflatten_tables import UnflattenTables
from vtr_export.passes.unfuse_skip_norms import UnfuseSkipNorms
from vtr_export.retrofit.fold import fold
from vtr_export.retrofit.masks import check_masks
from vtr_export.retrofit.positions import explicit_positions

OPSET: Final = 24
IR_VERSION: Final = 11
OURS: Final = ("inputs_embeds", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Decoder:
    """A canonical decoder and what was read off it.

    ``carried`` maps each input of the original's cache to the output it comes from.
    """

    model: ir.Model
    kinds: tuple[str, ...]
    heads: int | None
    kv_heads: int
    head_dim: int
    has_mrope: bool
    carried: dict[str, str]
    original_inputs: dict[str, str]


def load(file: Path) -> ir.Model:
    """The graph; its weights stay where they are. ``check_file`` looked at it before."""
    try:
        return ir.load(file)
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"cannot read the graph: {str(error).splitlines()[0]}",
            where=str(file),
            hint="export the decoder again",
        ) from error


def canonicalise(model: ir.Model) -> Decoder:
    """Rewrite ``model`` in place. AnalysisError where it holds what cannot be followed."""
    names = {id(value): value.name or "" for value in model.graph.inputs}
    model = run(
        (
            common.InlinePass(),
            common.TopologicalSortPass(),
            RaiseOpset(OPSET),
            UnfuseSkipNorms(),
        ),
        model,
    )
    _check_branches(model.graph)
    model = run((NameInputs(), NarrowShapes(), InferShapes(), UnflattenTables()), model)
    fold(model)
    model.ir_version = max(model.ir_version or 0, IR_VERSION)
    forms = find_forms(model.graph)
    _check_found(model.graph, forms)
    carried = _carried(model.graph, forms)
    kinds = tuple(form.kind for form in forms)
    check_masks(model, forms)
    inputs = {names[id(v)]: v.name or "" for v in model.graph.inputs if id(v) in names}
    first = forms[0]
    sweep = common.RemoveUnusedNodesPass(), common.TopologicalSortPass()
    model = run((CanonicalAttention(), *sweep), model)
    explicit_positions(model)
    model = run(
        (
            *sweep,
            NameCaches(),
            common.RemoveUnusedNodesPass(),
        ),
        model,
    )
    _drop_idle(model.graph)
    _give_positions(model.graph)
    model = run(
        (
            LiftEmbeddings(),
            AttachMask(),
            InferShapes(),
            PlainReshapes(),
            FixReshapes(),
            common.CommonSubexpressionEliminationPass(),
            *sweep,
        ),
        model,
    )
    _check_inputs(model.graph)
    positions = next((v for v in model.graph.inputs if v.name == "position_ids"), None)
    return Decoder(
        model,
        kinds,
        first.heads if first.kind != "MatMul-Softmax-MatMul" else None,
        first.kv_heads,
        first.head_dim,
        positions is not None and len(positions.shape or ()) == 3,
        carried,
        inputs,
    )


def _check_found(graph: ir.Graph, forms: list[Form]) -> None:
    if forms:
        return
    near = [node for node in graph if node.op_type in ("Softmax", "Attention")]
    where = f"node {near[0].name!r} ({near[0].op_type})" if near else f"graph {graph.name!r}"
    raise AnalysisError(
        "no attention reads a cache of past keys and values",
        where=where,
        hint="give a decoder with past and present inputs and outputs",
    )


def _check_branches(graph: ir.Graph) -> None:
    """AnalysisError for a decoder that lies in graphs within the graph."""
    branches = [node for node in graph if node.op_type in ("If", "Loop", "Scan")]
    if branches and not find_forms(graph):
        raise AnalysisError(
            "no attention reads a cache, unless it lies in a graph within the graph",
            where=f"node {branches[0].name!r} ({branches[0].op_type})",
            hint="give the decoder that always takes a past (decoder_with_past_model.onnx)",
        )


def _carried(graph: ir.Graph, forms: list[Form]) -> dict[str, str]:
    """Input of the past → the output that is its present."""
    carried = {}
    for form in forms:
        for past, present in zip(form.past, form.present, strict=True):
            source = cache_input(past)
            sink = _sink(graph, present)
            if source is None or sink is None:
                raise AnalysisError(
                    f"the keys or values {present.name!r} are no output of the graph",
                    where=f"node {form.node.name!r} ({form.kind})",
                    hint="export the decoder with its present keys and values as outputs",
                )
            carried[source.name or ""] = sink.name or ""
    return carried


def _sink(graph: ir.Graph, value: ir.Value) -> ir.Value | None:
    """The output that ``value`` is, or is laid out in."""
    seen = [value]
    for current in seen:
        if current.is_graph_output():
            return current
        users = (use.node for use in current.uses())
        joined = LAYOUT | {("", "Concat")}
        seen += [node.outputs[0] for node in users if (node.domain, node.op_type) in joined]
    return None


def _give_positions(graph: ir.Graph) -> None:
    """A decoder that reads no positions gets the input for as long as it is cut."""
    if all(value.name != "position_ids" for value in graph.inputs):
        graph.inputs.append(ir.val("position_ids", ir.DataType.INT64, ["batch", "sequence"]))


def _drop_idle(graph: ir.Graph) -> None:
    """Inputs that nothing reads any more: ours take their place."""
    for value in [*graph.inputs]:
        if not value.uses() and not value.is_graph_output() and value.name != "mask":
            graph.inputs.remove(value)
    for value in graph.inputs:
        if value.name == "attention_mask":
            reader = next(iter(value.uses())).node
            raise AnalysisError(
                "attention_mask is read by something that is neither a mask nor a position",
                where=f"node {reader.name!r} ({reader.op_type})",
                hint="vtr inspect shows the graph; export the decoder without it",
            )


def _is_option(value: ir.Value) -> bool:
    """Whether an input is a number or a few (num_logits_to_keep): no token lies in it."""
    shape = value.shape
    return shape is not None and len(shape) < 2 and all(isinstance(dim, int) for dim in shape)


def _check_inputs(graph: ir.Graph) -> None:
    """AnalysisError for an input that could carry tokens unseen."""
    lifted = next((value for value in graph.outputs if value.name == LIFTED), None)
    before = ancestors([lifted]) if lifted is not None else set()
    for value in graph.inputs:
        name = value.name or ""
        if name in OURS or name.startswith("past_key_values.") or _is_option(value):
            continue
        readers = [use.node for use in value.uses()]
        if readers and all(node in before for node in readers):
            continue
        where = f"node {readers[0].name!r} ({readers[0].op_type})" if readers else "nobody"
        raise AnalysisError(
            f"the input {name!r} {list(value.shape or ())} is none that a cut knows",
            where=f"read by {where}",
            hint="a decoder takes inputs_embeds or input_ids, attention_mask, position_ids, past",
        )
