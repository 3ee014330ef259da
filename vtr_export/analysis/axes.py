"""Label, by dataflow, which axis of every value counts this call's tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

LENGTH = "length"  # a number derived from the token count
OPAQUE = "opaque"  # tokens went in, and the analysis lost them


@dataclass(frozen=True)
class Axes:
    """``token`` is the axis of this call's tokens, ``key`` that of past and new tokens.

    ``state`` is empty, or says why there is no such axis although tokens are inside.
    """

    token: int | None = None
    key: int | None = None
    state: str = ""

    def __bool__(self) -> bool:
        return self != NONE

    def moved(self, move: Callable[[int], int | None]) -> "Axes":
        """Both axes after ``move`` (None: gone)."""
        token = move(self.token) if self.token is not None else None
        key = move(self.key) if self.key is not None else None
        return Axes(token, key, self.state)


NONE = Axes()
Labels = Mapping[ir.Value, Axes]


def label_axes(graph: ir.Graph, seeds: Labels) -> dict[ir.Value, Axes]:
    """Labels of every value that depends on ``seeds``, in topological order of ``graph``."""
    labels = dict(seeds)
    for node in graph:
        inputs = [labels.get(value, NONE) if value is not None else NONE for value in node.inputs]
        if not any(inputs):
            continue
        found = zip(node.outputs, _rule(node, inputs), strict=False)
        labels |= {value: axes for value, axes in found if axes}
    return labels


def _rule(node: ir.Node, inputs: list[Axes]) -> list[Axes]:
    """Labels of the outputs of ``node``."""
    if node.domain == "vtr" and node.op_type in OURS:
        return OURS[node.op_type](inputs)
    if node.domain not in ("", "vtr", "com.microsoft"):
        return [Axes(state=OPAQUE)] * len(node.outputs)
    if node.op_type in ("Shape", "Size"):
        return [Axes(state=LENGTH)]
    for state in (OPAQUE, LENGTH):
        if any(axes.state == state for axes in inputs):
            return [_through_state(inputs, state)] * len(node.outputs)
    if node.op_type in SAME:
        return [inputs[0]]
    rule = RULES.get(node.op_type, _broadcast if node.op_type in BROADCAST else None)
    if rule is None:
        return [Axes(state=OPAQUE)] * len(node.outputs)
    return [rule(node, inputs)] + [NONE] * (len(node.outputs) - 1)


def _through_state(inputs: list[Axes], state: str) -> Axes:
    """A length that shapes a labelled tensor makes it opaque; among numbers it stays a length."""
    labelled = any(axes.token is not None or axes.key is not None for axes in inputs)
    return Axes(state=OPAQUE if labelled else state)


def rank(value: ir.Value | None) -> int | None:
    """Number of axes, if known."""
    return len(value.shape) if value is not None and value.shape is not None else None


def _broadcast(node: ir.Node, inputs: list[Axes]) -> Axes:
    widest = rank(node.outputs[0]) or max(rank(value) or 0 for value in node.inputs)
    ranks = [widest if (own := rank(value)) is None else own for value in node.inputs]
    pairs = zip(inputs, ranks, strict=True)
    aligned = [_shifted(axes, widest - own) for axes, own in pairs if axes]
    tokens = {axes.token for axes in aligned if axes.token is not None}
    keys = {axes.key for axes in aligned if axes.key is not None}
    if len(tokens) > 1 or len(keys) > 1:
        return Axes(state=OPAQUE)
    return Axes(next(iter(tokens), None), next(iter(keys), None))


def _shifted(axes: Axes, by: int) -> Axes:
    return axes.moved(lambda axis: axis + by)


def _matmul(node: ir.Node, inputs: list[Axes]) -> Axes:
    left = rank(node.inputs[0])
    if inputs[1] or left is None or inputs[0].token == left - 1:
        return Axes(state=OPAQUE)
    wide = rank(node.outputs[0]) or left
    return inputs[0].moved(lambda axis: axis + wide - left)


def _gemm(node: ir.Node, inputs: list[Axes]) -> Axes:
    return inputs[0] if inputs[0].token == 0 and not inputs[1] else Axes(state=OPAQUE)


def _transpose(node: ir.Node, inputs: list[Axes]) -> Axes:
    order = list(node.attributes["perm"].as_ints())
    return inputs[0].moved(order.index)


def _constant(value: ir.Value | None) -> list[int] | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return [int(entry) for entry in tensor.numpy().reshape(-1)] if tensor is not None else None


def _unsqueeze(node: ir.Node, inputs: list[Axes]) -> Axes:
    axes, own = _constant(node.inputs[1]), rank(node.inputs[0])
    if axes is None or own is None:
        return Axes(state=OPAQUE)
    new = {axis % (own + len(axes)) for axis in axes}
    kept = [axis for axis in range(own + len(axes)) if axis not in new]
    return inputs[0].moved(lambda axis: kept[axis])


def _squeeze(node: ir.Node, inputs: list[Axes]) -> Axes:
    axes, own = _constant(node.inputs[1]), rank(node.inputs[0])
    if axes is None or own is None:
        return Axes(state=OPAQUE)
    gone = {axis % own for axis in axes}
    kept = [axis for axis in range(own) if axis not in gone]
    return inputs[0].moved(lambda axis: kept.index(axis) if axis in kept else None)


def _reshape(node: ir.Node, inputs: list[Axes]) -> Axes:
    """An axis survives behind leading dimensions that are copied one by one."""
    target = _constant(node.inputs[1])
    if target is None:
        return Axes(state=OPAQUE)
    kept = next((i for i, dim in enumerate(target) if dim != 0), len(target))
    lost = [axis for axis in (inputs[0].token, inputs[0].key) if axis is not None and axis >= kept]
    return Axes(state=OPAQUE) if lost else inputs[0]


def _concat(node: ir.Node, inputs: list[Axes]) -> Axes:
    """Past before new along the token axis makes keys."""
    own = next((r for value in node.inputs if (r := rank(value)) is not None), None)
    if own is None:
        return Axes(state=OPAQUE)
    axis = node.attributes["axis"].as_int() % own
    labelled = [axes for axes in inputs if axes]
    if any(axes.token == axis for axes in labelled):
        return Axes(key=axis) if len(labelled) == 1 else Axes(state=OPAQUE)
    return labelled[0] if len(set(labelled)) == 1 else Axes(state=OPAQUE)


def _slice(node: ir.Node, inputs: list[Axes]) -> Axes:
    """A slice of the token axis is no longer all tokens."""
    axes = _constant(node.inputs[3]) if len(node.inputs) > 3 else None
    own = rank(node.inputs[0])
    if axes is None or own is None:
        return Axes(state=OPAQUE)
    cut = {axis % own for axis in axes}
    return inputs[0].moved(lambda axis: None if axis in cut else axis)


def _gather(node: ir.Node, inputs: list[Axes]) -> Axes:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    own, width = rank(node.inputs[0]), rank(node.inputs[1])
    if own is None or width is None:
        return Axes(state=OPAQUE)
    axis %= own
    if inputs[1]:
        return inputs[1].moved(lambda at: at + axis)
    return inputs[0].moved(lambda at: None if at == axis else at if at < axis else at + width - 1)


def _reduce(node: ir.Node, inputs: list[Axes]) -> Axes:
    axes, own = _constant(node.inputs[1]) if len(node.inputs) > 1 else None, rank(node.inputs[0])
    keepdims = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    if axes is None or own is None:
        return Axes(state=OPAQUE)
    gone = {axis % own for axis in axes}
    kept = list(range(own)) if keepdims else [axis for axis in range(own) if axis not in gone]
    return inputs[0].moved(lambda axis: None if axis in gone else kept.index(axis))


def _attention(node: ir.Node, inputs: list[Axes]) -> Axes:
    return Axes(token=inputs[0].token)


SAME = {
    "Abs", "Cast", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid",
    "Identity", "IsNaN", "LayerNormalization", "LeakyRelu", "Log", "Neg", "Not",
    "RMSNormalization", "Reciprocal", "Relu", "RotaryEmbedding", "Sigmoid", "Sin", "Softmax",
    "Softplus", "Sqrt", "Swish", "Tanh",
}  # fmt: skip
BROADCAST = {
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min",
    "Mod", "Mul", "Or", "Pow", "Sub", "Where",
}  # fmt: skip
RULES: dict[str, Callable[[ir.Node, list[Axes]], Axes]] = {
    "Attention": _attention,
    "Concat": _concat,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMul": _matmul,
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
    "VtrBudget": lambda inputs: [NONE],
    "VtrCausalMask": lambda inputs: [Axes(token=2, key=3)],
    "VtrNarrow": lambda inputs: [inputs[0]],
    "VtrTail": lambda inputs: [NONE],
    "VtrTopKPrune": lambda inputs: [Axes(token=1), NONE, NONE],
    "VtrVisionCount": lambda inputs: [NONE],
}
