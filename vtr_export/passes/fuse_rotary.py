"""Recognise rotary position embeddings."""

from dataclasses import dataclass

import onnx_ir as ir

ELEMENTWISE = {"Cos", "Sin", "Cast", "Mul"}


@dataclass(frozen=True)
class Match:
    """``add`` rotates ``x`` by [B,S,d] tables ``cos`` and ``sin`` whose halves are equal."""

    add: ir.Node
    x: ir.Value
    cos: ir.Value
    sin: ir.Value


class FuseRotary(ir.passes.InPlacePass):
    """Turn a rotation by halves into one node; its tables become half as wide.

    Before::

        table = Concat(freqs, freqs); cos = Unsqueeze(Cos(table)); sin = Unsqueeze(Sin(table))
        Add(Mul(x, cos), Mul(Concat(Neg(x[d/2:]), x[:d/2]), sin))

    After::

        RotaryEmbedding(x, Cos(freqs), Sin(freqs))
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every rotation; the narrow tables are shared."""
        halves: dict[ir.Value, ir.Value] = {}
        found = 0
        for node in list(model.graph):
            match = _match(node)
            if match is not None:
                _replace(model.graph, match, halves)
                found += 1
        return ir.passes.PassResult(model, modified=bool(found))


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _match(node: ir.Node) -> Match | None:
    if node.op_type != "Add" or node.domain != "":
        return None
    left, right = (_producer(value, "Mul") for value in node.inputs)
    if left is None or right is None:
        return None
    for straight, turned in ((left, right), (right, left)):
        rotated = _rotated(turned)
        if rotated is None:
            continue
        x, sin = rotated
        cos = _other(straight, x)
        tables = _table(cos, x), _table(sin, x)
        if tables[0] is not None and tables[1] is not None:
            return Match(node, x, tables[0], tables[1])
    return None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    first, second = node.inputs
    return second if first is value else first if second is value else None


def _rotated(mul: ir.Node) -> tuple[ir.Value, ir.Value | None] | None:
    """``Concat(Neg(x[d/2:]), x[:d/2]) * sin`` of x [B,H,S,d] as (x, sin)."""
    for turned, other in (mul.inputs, reversed(mul.inputs)):
        concat = _producer(turned, "Concat")
        if concat is None or len(concat.inputs) != 2 or not _is_last_axis(concat):
            continue
        negated = _producer(concat.inputs[0], "Neg")
        upper = _producer(negated.inputs[0], "Slice") if negated is not None else None
        lower = _producer(concat.inputs[1], "Slice")
        if upper is None or lower is None or upper.inputs[0] is not lower.inputs[0]:
            continue
        x = lower.inputs[0]
        if x is not None and _are_halves(x, lower, upper):
            return x, other
    return None


def _is_last_axis(concat: ir.Node) -> bool:
    value = concat.outputs[0]
    axis = concat.attributes["axis"].as_int()
    return axis == -1 or (value.shape is not None and axis == len(value.shape) - 1)


def _are_halves(x: ir.Value, lower: ir.Node, upper: ir.Node) -> bool:
    """Whether the slices are x[..., :d/2] and x[..., d/2:] of x [B,H,S,d]."""
    width = x.shape[3] if x.shape is not None and len(x.shape) == 4 else None
    if not isinstance(width, int) or width % 2:
        return False
    half = width // 2
    bounds = [[_constant(value) for value in node.inputs[1:]] for node in (lower, upper)]
    if any(len(one) < 3 or one[2] not in ([-1], [3]) for one in bounds):
        return False
    if any(len(one) > 3 and one[3] != [1] for one in bounds):
        return False
    (start, middle), (again, end) = (one[:2] for one in bounds)
    return (start, middle, again) == ([0], [half], [half]) and end is not None and end[0] >= width


def _constant(value: ir.Value | None) -> list[int] | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return [int(entry) for entry in tensor.numpy().reshape(-1)] if tensor is not None else None


def _table(value: ir.Value | None, x: ir.Value) -> ir.Value | None:
    """The [B,S,d] table behind ``Unsqueeze``, if it is computed from two equal halves."""
    unsqueeze = _producer(value, "Unsqueeze")
    table = unsqueeze.inputs[0] if unsqueeze is not None else None
    if unsqueeze is None or table is None or _constant(unsqueeze.inputs[1]) != [1]:
        return None
    if table.shape is None or x.shape is None or len(table.shape) != 3:
        return None
    fits = [str(dim) for dim in table.shape] == [str(x.shape[axis]) for axis in (0, 2, 3)]
    return table if fits and _has_halves(table) else None


def _has_halves(value: ir.Value) -> bool:
    node = value.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type == "Concat":
        twice = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        return twice and _is_last_axis(node)
    first = node.inputs[0]
    if node.op_type not in ELEMENTWISE or first is None or not _has_halves(first):
        return False
    return all(_is_scalar(other) for other in node.inputs[1:])


def _is_scalar(value: ir.Value | None) -> bool:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor is not None and tensor.size == 1


def _replace(graph: ir.Graph, match: Match, halves: dict[ir.Value, ir.Value]) -> None:
    inputs = [match.x, _halve(graph, match.cos, halves), _halve(graph, match.sin, halves)]
    rotary = ir.Node("", "RotaryEmbedding", inputs, metadata_props=match.add.metadata_props)
    old, new = match.add.outputs[0], rotary.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    graph.insert_before(match.add, rotary)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(match.add, safe=True)


def _halve(graph: ir.Graph, value: ir.Value, halves: dict[ir.Value, ir.Value]) -> ir.Value:
    """``value`` computed from one half: the same nodes on ``freqs`` instead of its doubling."""
    if value in halves:
        return halves[value]
    node = value.producer()
    assert node is not None
    assert node.inputs[0] is not None
    if node.op_type == "Concat":
        halves[value] = node.inputs[0]
        return node.inputs[0]
    first = _halve(graph, node.inputs[0], halves)
    clone = ir.Node("", node.op_type, [first, *node.inputs[1:]], list(node.attributes.values()))
    clone.outputs[0].name = f"{value.name}.half"
    clone.outputs[0].type = value.type
    if value.shape is not None and isinstance(value.shape[-1], int):
        clone.outputs[0].shape = ir.Shape([*value.shape[:-1], value.shape[-1] // 2])
    graph.insert_before(node, clone)
    halves[value] = clone.outputs[0]
    return clone.outputs[0]
