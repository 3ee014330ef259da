"""Label, by dataflow, which axis of every value counts this call's tokens, or its vision keys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from vtr_export.ops import CUTS, is_cut

FAR = 2**31 - 1  # exporters write "to the end" as a bound at least this large
CROSS_STATES = "cross_states"  # the input [B,V,D] with features that cross-attention reads
LENGTH = "length"  # a number derived from the token count
OPAQUE = "opaque"  # tokens went in, and the analysis lost them


@dataclass(frozen=True)
class Axes:
    """``token`` is the axis of this call's tokens, ``key`` that of past and new tokens.

    ``vision`` is that of this call's vision keys, which cross-attention reads, ``vision_key`` that
    of past and new ones.
    ``state`` is empty, or says why there is no such axis although tokens are inside.
    """

    token: int | None = None
    key: int | None = None
    state: str = ""
    vision: int | None = None
    vision_key: int | None = None

    def __bool__(self) -> bool:
        return self != NONE

    @property
    def named(self) -> dict[str, Any]:
        """The axes there are, by what they count."""
        axes = {name: getattr(self, name) for name in COUNTED}
        return {name: axis for name, axis in axes.items() if axis is not None}

    @property
    def places(self) -> tuple[int, ...]:
        """The axes there are."""
        return tuple(self.named.values())

    def moved(self, move: Callable[[int], int | None]) -> "Axes":
        """All axes after ``move`` (None: gone)."""
        moved: dict[str, Any] = {name: move(axis) for name, axis in self.named.items()}
        return replace(self, **moved)


COUNTED = ("token", "key", "vision", "vision_key")
PAST = {"token": "key", "vision": "vision_key"}  # what a past before it makes of an axis
NONE, LOST = Axes(), Axes(state=OPAQUE)
Labels = Mapping[ir.Value, Axes]


def token_seeds(graph: ir.Graph) -> dict[ir.Value, Axes]:
    """The graph inputs with a token axis, told by the symbols in their shapes, or by name."""
    inputs = {value.name: value for value in graph.inputs}
    source = inputs.get("inputs_embeds", inputs.get("input_ids"))
    tokens, keys = symbol(source), symbol(inputs.get("attention_mask"))
    features = symbol(inputs.get(CROSS_STATES))
    seeds: dict[ir.Value, Axes] = {}
    for name, value in inputs.items():
        dims = [str(dim) for dim in value.shape or ()]
        token, key, vision = (
            dims.index(s) if s in dims else None for s in (tokens, keys, features)
        )
        if token is None and name in ("inputs_embeds", "input_ids", "position_ids"):
            token = 2 if name == "position_ids" and len(dims) == 3 else 1
        if axes := Axes(token, key if key != token else None, vision=vision):
            seeds[value] = axes
    return seeds


def symbol(value: ir.Value | None, axis: int = 1) -> str | None:
    """The name of a dimension, where it has one."""
    shape = value.shape if value is not None else None
    dim = shape[axis] if shape is not None and len(shape) > axis else None
    return dim.value if isinstance(dim, ir.SymbolicDim) else None


def label_axes(graph: ir.Graph, seeds: Labels) -> dict[ir.Value, Axes]:
    """Labels of every value that depends on ``seeds``, in topological order of ``graph``."""
    labels = dict(seeds)
    for node in graph:
        inputs = [labels.get(value, NONE) if value is not None else NONE for value in node.inputs]
        if not any(inputs) and not _has_graph(node):
            continue
        found = zip(node.outputs, _rule(node, inputs), strict=False)
        labels |= {value: axes for value, axes in found if axes}
    return labels


def _rule(node: ir.Node, inputs: list[Axes]) -> list[Axes]:
    """Labels of the outputs of ``node``."""
    if node.domain == "vtr" and node.op_type in OURS:
        return OURS[node.op_type](inputs)
    count = len(node.outputs)
    if node.domain not in ("", "vtr", "com.microsoft") or _has_graph(node):
        return [LOST] * count
    if node.op_type in ("Shape", "Size"):
        return [_lengths(node, inputs[0])]
    for state in (OPAQUE, LENGTH):
        if any(axes.state == state for axes in inputs):
            return [_through_state(inputs, state)] * count
    if node.op_type in SAME:
        return [inputs[0]] * count
    if node.op_type in ("Split", "TopK"):
        return [_split(node, inputs)] * count
    rule = RULES.get(node.op_type, _broadcast if node.op_type in BROADCAST else None)
    return [LOST] * count if rule is None else [rule(node, inputs)] + [LOST] * (count - 1)


def _has_graph(node: ir.Node) -> bool:
    """Whether ``node`` runs a graph of its own, which may read any value unseen."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def _lengths(node: ir.Node, axes: Axes) -> Axes:
    """Of ``Shape``: a length, unless only other axes are asked for."""
    own = rank(node.inputs[0])
    if own is None or axes.state or node.op_type == "Size":
        return Axes(state=LENGTH)
    bounds = (node.attributes.get(name) for name in ("start", "end"))
    asked = range(own)[slice(*(bound.as_int() if bound else None for bound in bounds))]
    return Axes(state=LENGTH) if set(axes.places) & set(asked) else NONE


def _through_state(inputs: list[Axes], state: str) -> Axes:
    """A length that shapes a labelled tensor makes it opaque; among numbers it stays a length."""
    labelled = any(axes.places for axes in inputs)
    return Axes(state=OPAQUE if labelled else state)


def rank(value: ir.Value | None) -> int | None:
    """Number of axes, if known: that of the value itself or of what it was made from."""
    while value is not None and value.shape is None:
        producer = value.producer()
        value = _like(producer, value) if producer is not None else None
    return len(value.shape) if value is not None and value.shape is not None else None


def _like(node: ir.Node, output: ir.Value) -> ir.Value | None:
    """The input of ``node`` that has as many axes as its ``output``."""
    if is_cut(node):
        return node.inputs[-1] if output is node.outputs[0] else None
    by_matrix = node.op_type == "MatMul" and rank(node.inputs[1]) == 2
    same = by_matrix or node.op_type in SAME or node.op_type in ("Transpose", "VtrNarrow")
    return node.inputs[0] if same else None


def _broadcast(node: ir.Node, inputs: list[Axes]) -> Axes:
    ranks = [rank(value) for value in node.inputs]
    known = [own for own in ranks if own is not None]
    widest = rank(node.outputs[0]) or (max(known) if len(known) == len(ranks) else None)
    if widest is None:
        return LOST
    aligned = []
    for axes, own in zip(inputs, ranks, strict=True):
        if axes and own is None:
            return LOST
        if axes and own is not None:
            aligned.append(_shifted(axes, widest - own))
    pairs = {pair for axes in aligned for pair in axes.named.items()}
    named: dict[str, Any] = dict(pairs)
    found = replace(NONE, **named)
    if len(pairs) > len(found.named) or len(set(found.places)) < len(pairs):
        return LOST
    others = [v for v, axes in zip(node.inputs, inputs, strict=True) if not axes]
    return found if all(_spreads(value, found, widest) for value in others) else LOST


def _spreads(value: ir.Value | None, axes: Axes, widest: int) -> bool:
    """False if ``value``, which knows no tokens, has several entries where ``axes`` count them."""
    if value is None or value.shape is None:
        return True
    own = [axis - widest + len(value.shape) for axis in axes.places]
    return all(axis < 0 or value.shape[axis] == 1 for axis in own)


def _shifted(axes: Axes, by: int) -> Axes:
    return axes.moved(lambda axis: axis + by)


def _matmul(node: ir.Node, inputs: list[Axes]) -> Axes:
    left, right = rank(node.inputs[0]), rank(node.inputs[1])
    wide = rank(node.outputs[0]) or (None if left is None or right is None else max(left, right))
    if left is None or wide is None:
        return LOST
    if inputs[1]:  # a column for each token: [.., 1] times [.., 1, S]
        is_column = right is not None and inputs[1] == Axes(token=right - 1) and right > 1
        return Axes(token=wide - 1) if is_column and not inputs[0] else LOST
    if left - 1 in inputs[0].places:
        return LOST
    return _shifted(inputs[0], wide - left)


def _matmul_by_weight(node: ir.Node, inputs: list[Axes]) -> Axes:
    """Rows times a weight that lies packed in the other inputs."""
    own = rank(node.inputs[0])
    is_open = own is not None and own - 1 not in inputs[0].places
    return inputs[0] if is_open and not any(inputs[1:]) else LOST


def _fused_matmul(node: ir.Node, inputs: list[Axes]) -> Axes:
    """``FusedMatMul``: a MatMul, unless an operand is turned."""
    turned = (node.attributes.get(name) for name in ("transA", "transBatchA", "transBatchB"))
    if inputs[1] or any(attribute is not None and attribute.as_int() for attribute in turned):
        return LOST
    return _matmul(node, inputs)


def _gemm(node: ir.Node, inputs: list[Axes]) -> Axes:
    turned = node.attributes.get("transA")
    if any(inputs[1:]) or inputs[0].token != 0 or (turned is not None and turned.as_int()):
        return LOST
    return inputs[0]


def _transpose(node: ir.Node, inputs: list[Axes]) -> Axes:
    order, own = node.attributes.get("perm"), rank(node.inputs[0])
    if order is not None:
        return inputs[0].moved(list(order.as_ints()).index)
    return LOST if own is None else inputs[0].moved(lambda axis: own - 1 - axis)


def _constant(value: ir.Value | None) -> list[int] | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return [int(entry) for entry in tensor.numpy().reshape(-1)] if tensor is not None else None


def _unsqueeze(node: ir.Node, inputs: list[Axes]) -> Axes:
    axes, own = _constant(node.inputs[1]), rank(node.inputs[0])
    if axes is None or own is None:
        return LOST
    new = {axis % (own + len(axes)) for axis in axes}
    kept = [axis for axis in range(own + len(axes)) if axis not in new]
    return inputs[0].moved(lambda axis: kept[axis])


def _squeeze(node: ir.Node, inputs: list[Axes]) -> Axes:
    axes, own = _constant(node.inputs[1]), rank(node.inputs[0])
    if axes is None or own is None:
        return LOST
    gone = {axis % own for axis in axes}
    kept = [axis for axis in range(own) if axis not in gone]
    return inputs[0].moved(lambda axis: kept.index(axis) if axis in kept else None)


def _reshape(node: ir.Node, inputs: list[Axes]) -> Axes:
    """An axis survives behind leading dimensions that are copied one by one."""
    target, literal = _constant(node.inputs[1]), node.attributes.get("allowzero")
    if target is None or (literal is not None and literal.as_int()):
        return LOST
    kept = next((i for i, dim in enumerate(target) if not _copied(node, i, dim)), len(target))
    lost = [axis for axis in inputs[0].places if axis >= kept]
    return Axes(state=OPAQUE) if lost else inputs[0]


def _copied(node: ir.Node, axis: int, dim: int) -> bool:
    """Whether a target says of an axis what it is already."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return dim == 0 or (shape is not None and axis < len(shape) and shape[axis] == dim)


def _expand(node: ir.Node, inputs: list[Axes]) -> Axes:
    """An axis stays where the target, aligned at the end, says 1."""
    target, own = _constant(node.inputs[1]), rank(node.inputs[0])
    if target is None or own is None:
        return LOST
    wide = max(own, len(target))
    found = _shifted(inputs[0], wide - own)
    full = [1] * (wide - len(target)) + target
    return found if all(full[axis] == 1 for axis in found.places) else LOST


def _concat(node: ir.Node, inputs: list[Axes]) -> Axes:
    """Past before new along the axis of tokens, or of vision keys, makes keys."""
    own = next((r for value in node.inputs if (r := rank(value)) is not None), None)
    if own is None:
        return LOST
    axis = node.attributes["axis"].as_int() % own
    labelled = [axes for axes in inputs if axes]
    for name, grown in PAST.items():
        if any(getattr(axes, name) == axis for axes in labelled):
            made: dict[str, Any] = {grown: axis}
            return replace(NONE, **made) if len(labelled) == 1 else LOST
    return labelled[0] if len(set(labelled)) == 1 else LOST


def _slice(node: ir.Node, inputs: list[Axes]) -> Axes:
    """All tokens stay tokens, one is a row like any other, some are neither."""
    starts, ends, axes, steps = (
        _constant(node.inputs[i]) if len(node.inputs) > i else None for i in range(1, 5)
    )
    own = rank(node.inputs[0])
    if starts is None or ends is None or axes is None or own is None:
        return LOST
    steps = steps or [1] * len(axes)
    spans = {
        axis % own: _span(start, end, step)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    }
    if any(spans.get(axis) == "some" for axis in inputs[0].places):
        return LOST
    return inputs[0].moved(lambda axis: None if spans.get(axis) == "one" else axis)


def _split(node: ir.Node, inputs: list[Axes]) -> Axes:
    """Of every output: parts of another axis, or its best entries."""
    own, usual = rank(node.inputs[0]), -1 if node.op_type == "TopK" else 0
    if own is None:
        return LOST
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else usual) % own
    return LOST if axis in inputs[0].places else inputs[0]


def _span(start: int, end: int, step: int) -> str:
    """How much of an axis of any length lies between two bounds."""
    if (start, step) == (0, 1) and end >= FAR:
        return "all"
    same_side = start * end > 0 or start == 0
    return "one" if (start == -1 and end >= FAR) or (same_side and end - start == 1) else "some"


def _gather(node: ir.Node, inputs: list[Axes]) -> Axes:
    """One row of the token axis is a row like any other; several are some tokens."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    own, width = rank(node.inputs[0]), rank(node.inputs[1])
    if own is None or width is None or all(inputs):
        return LOST
    axis %= own
    if inputs[1]:
        return inputs[1].moved(lambda at: at + axis)
    if axis in inputs[0].places and len(_constant(node.inputs[1]) or ()) != 1:
        return LOST
    return inputs[0].moved(lambda at: None if at == axis else at if at < axis else at + width - 1)


def _reduce(node: ir.Node, inputs: list[Axes]) -> Axes:
    axes, own = _constant(node.inputs[1]) if len(node.inputs) > 1 else None, rank(node.inputs[0])
    keepdims = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    if axes is None or own is None:
        return LOST
    gone = {axis % own for axis in axes}
    kept = list(range(own)) if keepdims else [axis for axis in range(own) if axis not in gone]
    return inputs[0].moved(lambda axis: None if axis in gone else kept.index(axis))


def _attention(node: ir.Node, inputs: list[Axes]) -> Axes:
    """A row for each query; the second and third output, keys and values, are not followed."""
    return Axes(token=inputs[0].token)


SAME = {
    "Abs", "BiasGelu", "Cast", "Ceil", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp", "FastGelu",
    "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsNaN", "LayerNormalization",
    "LeakyRelu", "Log", "MoE", "Neg", "Not", "QMoE", "QuickGelu", "RMSNormalization", "Reciprocal",
    "Relu", "RotaryEmbedding", "Sigmoid", "Sin", "Softmax", "Softplus", "Sqrt", "Swish", "Tanh",
}  # fmt: skip
BROADCAST = {
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min",
    "Mod", "Mul", "Or", "Pow", "Sub", "Where",
}  # fmt: skip
RULES: dict[str, Callable[[ir.Node, list[Axes]], Axes]] = {
    "Attention": _attention,
    "Concat": _concat,
    "Expand": _expand,
    "Gather": _gather,
    "FusedMatMul": _fused_matmul,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulNBits": _matmul_by_weight,
    "ReduceMax": _reduce,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
# Our operators, in graphs that were cut before: survivors are the tokens of the next stage.
OURS: dict[str, Callable[[list[Axes]], list[Axes]]] = {
    "VtrAlive": lambda inputs: [inputs[0]],
    "VtrCausalMask": lambda inputs: [Axes(token=2, key=3)],
    "VtrColumns": lambda inputs: [inputs[0]],
    "VtrCrossMask": lambda inputs: [Axes(token=2, vision_key=3)],
    "VtrCrossRows": lambda inputs: [Axes(token=1)],
    "VtrGroupMask": lambda inputs: [Axes(token=2, key=3)],
    "VtrNarrow": lambda inputs: [inputs[0]],
    **dict.fromkeys(("VtrMark", "VtrPack", "VtrRaters"), lambda inputs: [Axes(token=1)]),
    **dict.fromkeys(CUTS, lambda inputs: [inputs[-1], NONE, NONE, NONE]),
    **dict.fromkeys(("VtrBudget", "VtrMarked", "VtrVisionCount"), lambda inputs: [NONE]),
    **dict.fromkeys(("VtrRowsLast", "VtrRowsText", "VtrTail"), lambda inputs: [NONE]),
}
