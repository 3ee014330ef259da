"""Write out each round of a loop whose number of rounds is known."""

from collections.abc import Mapping

import onnx_ir as ir
import onnx_ir.passes.common as common

from vtr_export.errors import AnalysisError

MOST = 4096  # rounds


class UnrollLoops(ir.passes.InPlacePass):
    """Repeat the body of every Loop as often as it runs.

    Before::

        y = Loop <body> (3, true, x)                    # body: (i, go, x) => (go, f(i, x))

    After::

        y = f(2, f(1, f(0, x)))

    TensorRT-RTX 1.7.1 ends by a signal, or takes all memory, where it compiles our loops; written
    out it builds them. Functions that hold loops are inlined.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """AnalysisError for a loop that ends when it likes, or collects what its rounds give."""
        if not any(map(_loops, model.functions.values())) and not _loops(model.graph):
            return ir.passes.PassResult(model, modified=False)
        common.InlinePass(criteria=lambda function: _holds_loop(model, function))(model)
        while found := _loops(model.graph):
            _unroll(found[0])
        return ir.passes.PassResult(model, modified=True)


def _loops(body: ir.Graph | ir.Function) -> list[ir.Node]:
    return [node for node in body if node.domain == "" and node.op_type == "Loop"]


def _holds_loop(model: ir.Model, function: ir.Function) -> bool:
    """Whether it has one, or what it calls has."""
    called = (model.functions.get(node.op_identifier()) for node in function)
    return bool(_loops(function)) or any(
        _holds_loop(model, inner) for inner in called if inner is not None
    )


def _unroll(loop: ir.Node) -> None:
    graph = loop.graph
    assert graph is not None
    body = loop.attributes["body"].as_graph()
    rounds, carried = _rounds(loop), list(loop.inputs[2:])
    _check(loop, body)
    number, going, *entering = body.inputs
    for done in range(rounds):
        index = ir.Node("", "Constant", [], [ir.AttrInt64("value_int", done)])
        index.outputs[0].name = f"{loop.outputs[0].name}.{done}.number"
        index.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        index.outputs[0].shape = ir.Shape(())
        graph.insert_before(loop, index)
        values: dict[ir.Value, ir.Value | None] = {number: index.outputs[0], going: loop.inputs[1]}
        values |= dict(zip(entering, carried, strict=True))
        for node in body:
            graph.insert_before(loop, _clone(node, values, f"{loop.outputs[0].name}.{done}"))
        carried = [values[value] for value in body.outputs[1:]]
    for old, new in zip(loop.outputs, carried, strict=True):
        assert new is not None
        if old.is_graph_output():
            new = _named(graph, loop, new, old)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(loop, safe=True)


def _named(graph: ir.Graph, loop: ir.Node, value: ir.Value, old: ir.Value) -> ir.Value:
    """``value`` under the name of an output of the graph."""
    same = ir.Node("", "Identity", [value])
    graph.insert_before(loop, same)
    new = same.outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.name = f"{old.name}.loop"
    return new


def _clone(node: ir.Node, values: dict[ir.Value, ir.Value | None], prefix: str) -> ir.Node:
    """A copy that reads ``values`` of this round, which its own outputs join."""
    inputs = [values.get(value, value) if value is not None else None for value in node.inputs]
    attributes: Mapping[str, ir.Attr] = node.attributes
    count = len(node.outputs)
    clone = ir.Node(node.domain, node.op_type, inputs, list(attributes.values()), num_outputs=count)
    clone.name = f"{prefix}.{node.outputs[0].name}"
    for old, new in zip(node.outputs, clone.outputs, strict=True):
        new.name, new.type, new.shape = f"{prefix}.{old.name}", old.type, old.shape
        values[old] = new
    return clone


def _check(loop: ir.Node, body: ir.Graph) -> None:
    """A condition that is handed on, and values that are."""
    condition = body.outputs[0].producer()
    is_kept = body.outputs[0] is body.inputs[1] or (
        condition is not None
        and condition.op_type == "Identity"
        and condition.inputs[0] is body.inputs[1]
    )
    nested = any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for node in body
        for attribute in node.attributes.values()
    )
    if not is_kept or nested or len(body.outputs) != len(loop.inputs) - 1:
        raise AnalysisError(
            "a loop has a condition, collects values, or holds another graph: not written out",
            where=f"node {loop.name!r}",
            hint="use target onnxruntime",
        )


def _rounds(loop: ir.Node) -> int:
    """What its first input says; AnalysisError where that is no constant."""
    value = loop.inputs[0]
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type not in ("Identity", "Squeeze"):
            break
        value = producer.inputs[0]
    found = ir.convenience.get_const_tensor(value) if value is not None else None
    if found is None or found.size != 1 or not 0 <= int(found.numpy().reshape(())) <= MOST:
        raise AnalysisError(
            f"the rounds of a loop are no constant up to {MOST}",
            where=f"node {loop.name!r}",
            hint="use target onnxruntime",
        )
    return int(found.numpy().reshape(()))
