"""Append named nodes to a graph; the caller's topological sort puts them in order."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

import onnx_ir as ir

from vtr_export import ops
from vtr_export.analysis.layers import order_of


class Build:
    """Nodes named ``<prefix>.<what>``, operators declared as they are called."""

    def __init__(self, model: ir.Model, choice: ops.Choice, prefix: str = "") -> None:
        self.model, self.graph, self.choice, self.prefix = model, model.graph, choice, prefix

    @cached_property
    def order(self) -> Mapping[ir.Node, int]:
        """Where the nodes stood before any was added."""
        return order_of(self.graph)

    def op(self, op_type: str, inputs: Sequence[ir.Value], name: str, **attrs: int) -> ir.Value:
        """One standard operator with integer attributes."""
        return self._append("", op_type, inputs, [name], _integers(attrs))[0]

    def call(self, operator: str, inputs: Sequence[ir.Value], name: str, **attrs: int) -> ir.Value:
        """One of our operators (its abstract name stands for the chosen variant)."""
        ops.declare(self.model, operator, self.choice)
        chosen = self.choice.names().get(operator, operator)
        return self._append(ops.DOMAIN, chosen, inputs, [name], _integers(attrs))[0]

    def calls(
        self, operator: str, inputs: Sequence[ir.Value], names: Sequence[str], **attrs: float | str
    ) -> Sequence[ir.Value]:
        """One of our operators with several outputs, or attributes that are no integers."""
        ops.declare(self.model, operator, self.choice)
        chosen = self.choice.names().get(operator, operator)
        floats = [ir.AttrFloat32(n, v) for n, v in attrs.items() if isinstance(v, float)]
        whole = {name: value for name, value in attrs.items() if isinstance(value, int)}
        words = [ir.AttrString(n, v) for n, v in attrs.items() if isinstance(v, str)]
        said = [*floats, *words, *_integers(whole)]
        return self._append(ops.DOMAIN, chosen, inputs, names, said)

    def prune(
        self, inputs: Sequence[ir.Value], scale: float
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """``VtrTopKPrune``: narrow hidden states, kept indices, narrow vision index."""
        ops.declare(self.model, ops.PRUNE, self.choice)
        names = ["hidden", "kept", "vision_index"]
        attributes = ops.prune_attributes(scale, self.choice)
        hidden, kept, index = self._append(ops.DOMAIN, ops.PRUNE, inputs, names, attributes)
        return hidden, kept, index

    def narrow(self, value: ir.Value, kept: ir.Value, *, axis: int, name: str) -> ir.Value:
        """``value`` at the indices ``kept`` [B,S'] of its token axis."""
        narrowed = self._along(axis, "VtrNarrow", value, kept, name)
        narrowed.type = value.type
        if value.shape is not None:
            narrowed.shape = ir.Shape([None if i == axis else d for i, d in enumerate(value.shape)])
        return narrowed

    def tail(self, value: ir.Value, count: ir.Value, *, axis: int, name: str) -> ir.Value:
        """The last ``count`` [1] entries of the token axis of ``value``."""
        return self._along(axis, "VtrTail", value, count, name)

    def _along(
        self, axis: int, operator: str, value: ir.Value, which: ir.Value, name: str
    ) -> ir.Value:
        """An operator that works on axis 1, applied to another axis."""
        if axis == 1:
            return self.call(operator, [value, which], name)
        assert value.shape is not None
        order = [0, axis, *(i for i in range(1, len(value.shape)) if i != axis)]
        front = self._permute(value, order, f"{name}.front")
        found = self.call(operator, [front, which], f"{name}.found")
        return self._permute(found, [order.index(i) for i in range(len(order))], name)

    def constant(self, values: Sequence[int], name: str) -> ir.Value:
        """An int64 vector."""
        node = ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", values)])
        node.outputs[0].name = f"{self.prefix}.{name}"
        self.graph.append(node)
        return node.outputs[0]

    def graph_input(self, name: str, shape: Sequence[int | str], dtype: ir.DataType) -> ir.Value:
        """A new input of the graph."""
        value = ir.val(name, dtype, shape)
        self.graph.inputs.append(value)
        return value

    def graph_output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        """Show ``value`` as output ``name`` (int64)."""
        value.name = name
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(shape)
        self.graph.outputs.append(value)

    def _permute(self, value: ir.Value, order: Sequence[int], name: str) -> ir.Value:
        node = ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", order)])
        node.outputs[0].name = f"{self.prefix}.{name}"
        self.graph.append(node)
        return node.outputs[0]

    def _append(
        self,
        domain: str,
        op_type: str,
        inputs: Sequence[ir.Value],
        names: Sequence[str],
        attributes: Sequence[ir.Attr],
    ) -> Sequence[ir.Value]:
        node = ir.Node(domain, op_type, inputs, attributes, num_outputs=len(names))
        node.name = f"{self.prefix}.{op_type}.{names[0]}"
        for output, name in zip(node.outputs, names, strict=True):
            output.name = f"{self.prefix}.{name}"
        self.graph.append(node)
        return node.outputs


def _integers(attributes: Mapping[str, int]) -> list[ir.Attr]:
    return [ir.AttrInt64(name, value) for name, value in attributes.items()]


def replay(
    build: Build,
    value: ir.Value,
    source: ir.Value,
    substitutes: Mapping[ir.Value, ir.Value],
    name: str,
) -> ir.Value:
    """``value``, which depends on ``source``, computed again from ``substitutes``.

    The copies are called ``<prefix>.<name>.<original>``.
    """
    copies = dict(substitutes)
    for node in sorted(_path(value, source, copies), key=build.order.__getitem__):
        inputs = [copies.get(v, v) if v is not None else None for v in node.inputs]
        clone = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
        )
        for old, new in zip(node.outputs, clone.outputs, strict=True):
            new.name, new.type = f"{build.prefix}.{name}.{old.name}", old.type
            if old.shape is not None:
                new.shape = ir.Shape([dim if isinstance(dim, int) else None for dim in old.shape])
            copies[old] = new
        build.graph.append(clone)
    return copies[value]


def _path(value: ir.Value, source: ir.Value, known: Collection[ir.Value]) -> list[ir.Node]:
    """Nodes between ``source`` and ``value``; behind ``known`` values nothing is looked at."""
    depends: dict[ir.Node | None, bool] = {None: False}
    path: list[ir.Node] = []
    stack: list[tuple[ir.Node | None, bool]] = [(value.producer(), False)]
    while stack:
        node, is_done = stack.pop()
        if node is None or (node in depends and not is_done):
            continue
        before = [(v, v.producer()) for v in node.inputs if v is not None]
        if is_done:
            depends[node] = any(v is source or (v not in known and depends[p]) for v, p in before)
            if depends[node]:
                path.append(node)
            continue
        depends[node] = False
        stack.append((node, True))
        stack.extend((p, False) for v, p in before if v not in known)
    return path


def renamed(shape: ir.Shape | None, stage: int, lengths: Sequence[str]) -> ir.Shape | None:
    """``shape`` with this stage's own names for ``lengths``."""
    if shape is None or stage == 0:
        return shape
    own = {name: f"{name}_{stage}" for name in lengths}
    return ir.Shape([own.get(str(dim), dim) for dim in shape])
