"""Write out operators that came after opset 20 in those that it has."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Final

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from vtr_export.errors import AnalysisError

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
LOWEST: Final = -3.4028234663852886e38  # of fp32: exp(LOWEST - x) is 0, and a row of it no NaN


class Decompose(ir.passes.InPlacePass):
    """Write out attention, norms, rotations, counts, and casts, of a graph without functions.

    Before::

        Attention(query, key, value, mask)
        RMSNormalization(x, weight); RotaryEmbedding(x, cos, sin); CumSum(count, 1)

    After::

        MatMul(Softmax(Where(mask, Cast(MatMul(Mul(query, scale), Transpose(key))), lowest)), value)
        Mul(Cast(Div(x, Sqrt(ReduceMean(x²) + epsilon))), weight); …

    Softmax and the mean are computed in fp32, products in the graph's dtype; query heads that share
    a key head are rows of one product, so that no key is copied. A running count is a product with
    a triangle of ones, exact below 2²⁴: TensorRT 10 would take a step of a loop for each token.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Infer shapes and ask for what each rewrite needs, then rewrite."""
        found = [node for node in model.graph if node.domain == "" and node.op_type in _REWRITES]
        found = [node for node in found if node.op_type != "Squeeze" or len(node.inputs) == 1]
        if found:
            ShapeInferencePass(data_prop=False)(model)
        found = [node for node in found if _CHECKS[node.op_type](node)]
        for node in found:
            _rewrite(model.graph, node)
        return ir.passes.PassResult(model, modified=bool(found))


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    tape = ir.tape.Tape()
    old = node.outputs[0]
    new = _REWRITES[node.op_type](tape, node)
    for number, made in enumerate(tape.nodes):
        made.name = f"{old.name}.{number}.{made.op_type}"
        for value in made.outputs:
            value.name = made.name
    new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], list(tape.nodes), [old], [new])


def _attention(tape: ir.tape.Tape, node: ir.Node) -> ir.Value:
    query, key, value, *masks = node.inputs
    assert query is not None
    assert key is not None
    assert query.dtype is not None
    heads, kv_heads, width = _fixed(query, 1), _fixed(key, 1), _fixed(query, 3)
    scale = node.attributes.get_float("scale", 1 / math.sqrt(width))
    scaled = tape.op("Mul", [query, _scalar(tape, scale, query.dtype)])
    if heads != kv_heads:
        scaled = _regroup(tape, scaled, kv_heads)
    columns = tape.op("Transpose", [key], {"perm": [0, 1, 3, 2]})
    logits = tape.op("MatMul", [scaled, columns])
    if heads != kv_heads:
        logits = _regroup(tape, logits, heads)
    logits = tape.op("Cast", [logits], {"to": FLOAT})
    for mask in masks:
        logits = tape.op("Where", [mask, logits, _scalar(tape, LOWEST, FLOAT)])
    probability = tape.op("Softmax", [logits], {"axis": -1})
    probability = tape.op("Cast", [probability], {"to": query.dtype})
    if heads == kv_heads:
        return tape.op("MatMul", [probability, value])
    probability = _regroup(tape, probability, kv_heads)
    return _regroup(tape, tape.op("MatMul", [probability, value]), heads)


def _regroup(tape: ir.tape.Tape, value: ir.Value, groups: int) -> ir.Value:
    """[B, groups', rows', n] as [B, groups, rows, n]; nothing of it is empty."""
    shape = tape.op("Constant", [], {"value_ints": [0, groups, -1, 0]})
    return tape.op("Reshape", [value, shape])


def _norm(tape: ir.tape.Tape, node: ir.Node) -> ir.Value:
    x, weight = node.inputs
    assert x is not None
    assert x.dtype is not None
    wide = tape.op("Cast", [x], {"to": FLOAT})
    squares = tape.op("Mul", [wide, wide])
    mean = tape.op("ReduceMean", [squares, _vector(tape, -1)], {"keepdims": 1})
    epsilon = _scalar(tape, node.attributes.get_float("epsilon", 1e-5), FLOAT)
    root = tape.op("Sqrt", [tape.op("Add", [mean, epsilon])])
    normal = tape.op("Cast", [tape.op("Div", [wide, root])], {"to": x.dtype})
    return tape.op("Mul", [normal, weight])


def _rotary(tape: ir.tape.Tape, node: ir.Node) -> ir.Value:
    x, *tables = node.inputs
    assert x is not None
    width = _fixed(x, 3)
    bounds = [_vector(tape, bound) for bound in (0, width // 2, width)]
    lower, upper = (
        tape.op("Slice", [x, start, end, _vector(tape, 3)]) for start, end in pairwise(bounds)
    )
    cos, sin = (tape.op("Unsqueeze", [table, _vector(tape, 1)]) for table in tables)
    first = tape.op("Sub", [tape.op("Mul", [lower, cos]), tape.op("Mul", [upper, sin])])
    second = tape.op("Add", [tape.op("Mul", [lower, sin]), tape.op("Mul", [upper, cos])])
    return tape.op("Concat", [first, second], {"axis": 3})


def _count(tape: ir.tape.Tape, node: ir.Node) -> ir.Value:
    counted = node.inputs[0]
    zero, one = (tape.op("Constant", [], {"value_int": number}) for number in (0, 1))
    length = tape.op("Shape", [counted], {"start": 1, "end": 2})
    length = tape.op("Squeeze", [length, _vector(tape, 0)])
    position = tape.op("Range", [zero, length, one])
    earlier = tape.op("Unsqueeze", [position, _vector(tape, 1)])
    triangle = tape.op("LessOrEqual", [earlier, position])
    triangle = tape.op("Cast", [triangle], {"to": FLOAT})
    wide = tape.op("Cast", [counted], {"to": FLOAT})
    return tape.op("Cast", [tape.op("MatMul", [wide, triangle])], {"to": INT64})


def _squeeze(tape: ir.tape.Tape, node: ir.Node) -> ir.Value:
    return tape.op("Squeeze", [node.inputs[0], _vector(tape, 0)])


def _cast_like(tape: ir.tape.Tape, node: ir.Node) -> ir.Value:
    value, like = node.inputs
    assert like is not None
    return tape.op("Cast", [value], {"to": like.dtype})


def _vector(tape: ir.tape.Tape, number: int) -> ir.Value:
    return tape.op("Constant", [], {"value_ints": [number]})


def _scalar(tape: ir.tape.Tape, number: float, dtype: ir.DataType) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(number, dtype=dtype)})


def _fixed(value: ir.Value, axis: int) -> int:
    """A dimension that every caller has checked."""
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


def _check(node: ir.Node, ports: int, zero: tuple[str, ...], fixed: Mapping[int, int]) -> bool:
    """True, or AnalysisError: ``ports`` inputs, attributes ``zero``, ``fixed`` input → its axis.

    Every input named in ``fixed`` is of rank four.
    """
    inputs = [value for value in node.inputs if value is not None]
    used = [name for name in zero if name in node.attributes and node.attributes[name].value]
    if len(inputs) > ports or len(inputs) != len(node.inputs) or len(node.outputs) > 1 or used:
        raise _refusal(node, f"inputs, outputs or {', '.join(used) or 'types'} beyond that")
    for index, axis in fixed.items():
        shape = inputs[index].shape
        if shape is None or len(shape) != 4 or not isinstance(shape[axis], int):
            raise _refusal(node, f"input {index} of unknown heads or width")
    if inputs[0].dtype is None:
        raise _refusal(node, "an unknown dtype")
    return True


def _refusal(node: ir.Node, what: str) -> AnalysisError:
    return AnalysisError(
        f"{node.op_type} {node.name!r} has {what}",
        hint="give a graph that vtr export wrote: a mask, no past, caches of cosines and sines",
    )


def _check_attention(node: ir.Node) -> bool:
    zero = ("is_causal", "softcap", "q_num_heads", "kv_num_heads", "qk_matmul_output_mode")
    _check(node, 4, zero, {0: 3, 1: 1})
    mask = node.inputs[3] if len(node.inputs) == 4 else None
    if mask is not None and mask.dtype != ir.DataType.BOOL:
        raise _refusal(node, "a mask that is not bool")
    return _check(node, 4, zero, {0: 1})


def _check_norm(node: ir.Node) -> bool:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    last = (-1,) if shape is None else (-1, len(shape) - 1)
    if node.attributes.get_int("axis", -1) not in last:
        raise _refusal(node, "another axis than the last")
    return _check(node, 2, (), {})


def _check_rotary(node: ir.Node) -> bool:
    return _check(node, 3, ("interleaved", "rotary_embedding_dim", "num_heads"), {0: 3})


def _check_count(node: ir.Node) -> bool:
    counted, axis = node.inputs
    assert counted is not None
    assert axis is not None
    tensor = ir.convenience.get_const_tensor(axis)
    is_vector = counted.shape is not None and len(counted.shape) == 2
    is_along = tensor is not None and tensor.numpy().reshape(-1).tolist() == [1]
    if not is_vector or not is_along or counted.dtype != INT64:
        raise _refusal(node, "something else to count than rows of int64")
    return _check(node, 2, ("exclusive", "reverse"), {})


def _check_cast(node: ir.Node) -> bool:
    like = node.inputs[1]
    if like is None or like.dtype is None:
        raise _refusal(node, "an unknown dtype")
    return True


def _is_vector(node: ir.Node) -> bool:
    """Whether a Squeeze that names no axis has but one."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return shape is not None and len(shape) == 1


_REWRITES: Final[Mapping[str, Callable[[ir.tape.Tape, ir.Node], ir.Value]]] = {
    "Attention": _attention,
    "RMSNormalization": _norm,
    "RotaryEmbedding": _rotary,
    "CumSum": _count,
    "CastLike": _cast_like,
    "Squeeze": _squeeze,
}
_CHECKS: Final[Mapping[str, Callable[[ir.Node], bool]]] = {
    "Attention": _check_attention,
    "RMSNormalization": _check_norm,
    "RotaryEmbedding": _check_rotary,
    "CumSum": _check_count,
    "CastLike": _check_cast,
    "Squeeze": _is_vector,
}
