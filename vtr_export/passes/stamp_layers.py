"""Trace three layers, have as many as the model: a layer's graph is stamped, not traced again."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from vtr_export.analysis.layers import ancestors, descendants, residual
from vtr_export.errors import AnalysisError

TRACED = 3


@dataclass(frozen=True)
class Body:
    """The nodes of the middle layer, from the stream that enters it to the one that leaves."""

    entry: ir.Value
    exit: ir.Value
    nodes: tuple[ir.Node, ...]


class StampLayers(ir.passes.InPlacePass):
    """Repeat the middle one of three traced layers until there are ``count``.

    Before::

        layers.0 → layers.1 → layers.2 → norm

    After::

        layers.0 → layers.1 → … → layers.(count-1) → norm

    ``stack`` is the dotted name of the layers' list in initializers' names. Values are told apart
    by the number after ``stack``, ``past_key_values`` and ``present``.
    """

    def __init__(self, count: int, stack: str) -> None:
        self.count, self.stack = count, stack

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename the last layer to its final number, then copy the middle one."""
        if self.count <= TRACED:
            return ir.passes.PassResult(model, modified=False)
        weights = model.graph.initializers.values()
        own = [value for value in weights if self._renamed(value.name or "", 1, 2) != value.name]
        body = _find_body(model.graph, own)
        last = {value: self._renamed(name, 2, self.count - 1) for value, name in _named(model)}
        for value, name in last.items():
            _rename(model.graph, value, name)
        stream, anchor = body.exit, body.nodes[-1]
        tail = body.nodes[-1].outputs[0]
        followers = [use for use in body.exit.uses() if use.node not in body.nodes]
        for number in range(2, self.count - 1):
            copies = self._stamp(model.graph, body, stream, number, anchor)
            stream, anchor = copies[body.exit], copies[tail].producer() or anchor
        for use in followers:
            use.node.replace_input_with(use.idx, stream)
        _sort_signature(model.graph)
        return ir.passes.PassResult(model, modified=True)

    def _renamed(self, name: str, old: int, new: int) -> str:
        pattern = rf"^({re.escape(self.stack)}|past_key_values|present)\.{old}\."
        return re.sub(pattern, rf"\g<1>.{new}.", name)

    def _stamp(
        self, graph: ir.Graph, body: Body, stream: ir.Value, number: int, anchor: ir.Node
    ) -> Mapping[ir.Value, ir.Value]:
        """Append layer ``number``, reading ``stream``; original value → its copy."""
        copies: dict[ir.Value, ir.Value] = {body.entry: stream}
        outputs = set(graph.outputs)
        clones: list[ir.Node] = []
        for node in body.nodes:
            for value in node.inputs:
                if value is not None and value not in copies:
                    copies[value] = self._outside(graph, value, number)
            inputs = [copies[value] if value is not None else None for value in node.inputs]
            clone = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
                name=f"{node.name}.layer.{number}" if node.name else None,
            )
            for old, new in zip(node.outputs, clone.outputs, strict=True):
                new.name = self._renamed(old.name or "", 1, number)
                if new.name == old.name:
                    new.name = f"{old.name}.layer.{number}"
                new.shape, new.type = old.shape, old.type
                copies[old] = new
                if old in outputs:
                    graph.outputs.append(new)
            clones.append(clone)
        graph.insert_after(anchor, clones)
        return copies

    def _outside(self, graph: ir.Graph, value: ir.Value, number: int) -> ir.Value:
        """The layer's own weight or past where ``value`` is one, else ``value`` itself."""
        name = self._renamed(value.name or "", 1, number)
        if name == value.name:
            return value
        own = ir.Value(name=name, shape=value.shape, type=value.type)
        if value.is_initializer():
            own.const_value = value.const_value
            graph.initializers[name] = own
        else:
            graph.inputs.append(own)
        return own


def _find_body(graph: ir.Graph, own_values: Sequence[ir.Value]) -> Body:
    sites = [node for node in graph if node.op_type == "Attention"]
    if len(sites) != TRACED:
        raise AnalysisError(
            f"{len(sites)} attention nodes were traced, not {TRACED}",
            hint="report the model: its layers cannot be exported yet",
        )
    entry = residual(graph, sites[0], sites[1])
    leaves = residual(graph, sites[1], sites[2])
    own = descendants(entry).union(*(descendants(value) for value in own_values))
    inside = own & ancestors([leaves])
    return Body(entry, leaves, tuple(node for node in graph if node in inside))


def _named(model: ir.Model) -> list[tuple[ir.Value, str]]:
    graph = model.graph
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    return [(value, value.name) for value in values if value.name is not None]


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if value.name == name:
        return
    if value.is_initializer():
        graph.initializers.pop(value.name or "")
        value.name = name
        graph.initializers[name] = value
    else:
        value.name = name


def _sort_signature(graph: ir.Graph) -> None:
    """Inputs and outputs by layer; those without a number keep their places in front."""
    key: Callable[[ir.Value], tuple[int, int]] = _layer_of
    for values in (graph.inputs, graph.outputs):
        ordered = sorted(values, key=key)
        values.clear()
        values.extend(ordered)


def _layer_of(value: ir.Value) -> tuple[int, int]:
    parts = (value.name or "").split(".")
    return (1, int(parts[1])) if len(parts) == 3 and parts[1].isdigit() else (0, 0)
