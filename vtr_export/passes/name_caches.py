"""Give every layer a cache of its own, under the names that runtimes know."""

import onnx_ir as ir

from vtr_export.analysis.forms import Form, find_forms
from vtr_export.analysis.forms.form import LAYOUT, cache_input
from vtr_export.analysis.layers import descendants
from vtr_export.errors import AnalysisError

JOINED = {("", "Concat"), ("", "SequenceConstruct")}


class NameCaches(ir.passes.InPlacePass):
    """Past and present by layer, one tensor each, [batch, kv_heads, tokens, head_dim].

    Before::

        keys = Concat(Gather(past_0: [2,B,H,P,d], 0), key); present_0 = Concat(Unsqueeze(keys), …)

    After::

        present.0.key = Concat(past_key_values.0.key: [batch,H,past,d], key)

    Attention is canonical by now.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Outputs made of keys and values alone give way to keys and values."""
        graph = model.graph
        forms = find_forms(graph)
        was = [value.name for value in (*graph.inputs, *graph.outputs)]
        _check_places(forms)
        own = {value for form in forms for value in form.past}
        joined = {cache_input(value) for value in own} - own
        _drop_joined(graph, forms)
        for layer, form in enumerate(forms):
            for past, present, what in zip(form.past, form.present, ("key", "value"), strict=True):
                _past(graph, past, f"past_key_values.{layer}.{what}", form)
                _present(graph, present, f"present.{layer}.{what}", form)
        for source in joined:
            if source is not None and _is_idle(source):
                graph.inputs.remove(source)
        names = [value.name for value in (*graph.inputs, *graph.outputs)]
        return ir.passes.PassResult(model, modified=names != was)


def _check_places(forms: list[Form]) -> None:
    """AnalysisError where two layers share a cache: the second has none of its own to cut."""
    seen: dict[ir.Value, int] = {}
    for layer, form in enumerate(forms):
        past = form.past[0]
        if past in seen:
            raise AnalysisError(
                f"layers {seen[past]} and {layer} share the cache {past.name!r}",
                where=f"node {form.node.name!r}",
                hint="layers that share keys cannot be cut",
            )
        seen[past] = layer


def _drop_joined(graph: ir.Graph, forms: list[Form]) -> None:
    """Outputs that only lay keys and values out anew: each layer's own take their place."""
    own = {value for form in forms for value in form.present}
    for value in list(graph.outputs):
        if value not in own and _is_made_of(value, own):
            graph.outputs.remove(value)


def _is_made_of(value: ir.Value | None, own: set[ir.Value]) -> bool:
    if value in own:
        return True
    node = value.producer() if value is not None else None
    if node is None or (node.domain, node.op_type) not in LAYOUT | JOINED:
        return False
    inputs = node.inputs if node.op_type in ("Concat", "SequenceConstruct") else node.inputs[:1]
    return all(_is_made_of(each, own) for each in inputs)


def _past(graph: ir.Graph, past: ir.Value, name: str, form: Form) -> None:
    shape: list[int | str | None] = ["batch", form.kv_heads, "past", form.head_dim]
    if past.is_graph_input():
        past.name, past.shape = name, ir.Shape(shape)
        return
    source = cache_input(past)
    dtype = source.dtype if source is not None else None
    new = ir.val(name, dtype or ir.DataType.FLOAT, shape)
    graph.inputs.append(new)
    past.replace_all_uses_with(new)


def _present(graph: ir.Graph, present: ir.Value, name: str, form: Form) -> None:
    present.name = name
    present.shape = ir.Shape(["batch", form.kv_heads, "total", form.head_dim])
    if present.type is None:
        present.type = form.past[0].type
    if not present.is_graph_output():
        graph.outputs.append(present)


def _is_idle(value: ir.Value) -> bool:
    """Whether all that reads ``value`` leads nowhere."""
    return not any(each.is_graph_output() for node in descendants(value) for each in node.outputs)
