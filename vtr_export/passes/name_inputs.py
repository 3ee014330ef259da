"""Call the inputs of a foreign decoder what the analysis calls them."""

from typing import Final

import onnx_ir as ir

from vtr_export.analysis.forms import find_forms
from vtr_export.analysis.forms.form import cache_input
from vtr_export.errors import AnalysisError

BATCH, TOKENS, TOTAL = "batch", "sequence", "total"
SHAPES: Final = {
    "inputs_embeds": [BATCH, TOKENS],
    "input_ids": [BATCH, TOKENS],
    "attention_mask": [BATCH, TOTAL],
    "position_ids": [BATCH, TOKENS],
}
WHOLE: Final = (ir.DataType.INT64, ir.DataType.INT32)


class NameInputs(ir.passes.InPlacePass):
    """Names and symbolic shapes of the inputs that have a token axis.

    Before::

        float[b,s,8] hidden, int64[b2,t] attention_mask, int32[b,s] position_ids

    After::

        float[batch,sequence,8] inputs_embeds, int64[batch,total] attention_mask,
        int64[batch,sequence] position_ids

    What another name hides is told by type and rank where only one input fits.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find the one that carries the tokens, then the others by name."""
        graph = model.graph
        caches = {cache_input(value) for form in find_forms(graph) for value in form.past}
        others = [value for value in graph.inputs if value not in caches]
        named = {value.name: value for value in others}
        if not {"inputs_embeds", "input_ids"} & set(named):
            source = _only(others)
            source.name = "inputs_embeds"
            named["inputs_embeds"] = source
        modified = False
        for name, dims in SHAPES.items():
            if name in named:
                modified |= _shape(named[name], dims)
        if "position_ids" in named and named["position_ids"].dtype != ir.DataType.INT64:
            _widen(graph, named["position_ids"])
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _only(values: list[ir.Value]) -> ir.Value:
    """The one input of floats [B,S,D]."""
    fit = [
        value
        for value in values
        if value.shape is not None and len(value.shape) == 3 and value.dtype not in WHOLE
    ]
    if len(fit) == 1:
        return fit[0]
    names = ", ".join(repr(value.name) for value in values)
    raise AnalysisError(
        f"no input is called inputs_embeds or input_ids, and {len(fit)} could be",
        where=f"inputs {names}",
        hint="rename the one that carries the tokens, [batch, tokens, width] or [batch, tokens]",
    )


def _shape(value: ir.Value, dims: list[str]) -> bool:
    """Symbols for batch and tokens; the other dimensions stay, numbers as numbers."""
    own = list(value.shape or dims)
    front = [own[0]] if value.name == "position_ids" and len(own) == 3 else []
    rest = [_number(dim) for dim in own[len(front) + len(dims) :]]
    new = ir.Shape([*(_number(dim) for dim in front), *dims, *rest])
    modified = value.shape != new
    value.shape = new
    return modified


def _number(dim: object) -> int | str | None:
    text = str(dim)
    if isinstance(dim, int) or text.isdecimal():
        return int(text)
    return dim.value if isinstance(dim, ir.SymbolicDim) else None


def _widen(graph: ir.Graph, value: ir.Value) -> None:
    """int64 outside, what it was inside."""
    wanted = value.dtype
    assert wanted is not None
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", wanted)])
    cast.name = cast.outputs[0].name = f"{value.name}.{wanted.name.lower()}"
    cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
    value.replace_all_uses_with(cast.outputs[0])
    cast.replace_input_with(0, value)
    value.type = ir.TensorType(ir.DataType.INT64)
    if len(graph):
        graph.insert_before(graph[0], cast)
