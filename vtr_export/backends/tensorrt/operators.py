"""Hold a lowered graph against the table of what TensorRT 10 parses."""

from collections.abc import Iterator

import onnx_ir as ir

from vtr_export.tensorrt_10 import OPERATORS, OPSET, SINCE, VERSION, Operator

_MAKES_ITS_TYPE = ("Cast", "Constant", "ConstantOfShape")


def refused(model: ir.Model) -> tuple[str, ...]:
    """Why TensorRT 10 would not parse ``model``; empty: it would, by its table.

    Types must be inferred. Names of operators match in any domain there, and functions are calls.
    """
    reasons = list(_versions(model))
    for node in model.graph:
        reasons += [f"{node.op_type} {node.name!r}: {reason}" for reason in _node(node)]
    return tuple(dict.fromkeys(reasons))


def _versions(model: ir.Model) -> Iterator[str]:
    opset = model.opset_imports.get("", 0)
    if opset > OPSET:
        yield f"opset {opset}: at most {OPSET}"
    for domain in set(model.opset_imports) - {""}:
        yield f"operators of the domain {domain}"


def _node(node: ir.Node) -> Iterator[str]:
    operator = OPERATORS.get(node.op_type)
    if operator is None:
        since = SINCE.get(node.op_type)
        yield f"in TensorRT from {since} on, not in {VERSION}" if since else "not in the table"
        return
    for name, value in operator.only.items():
        given = node.attributes.get(name)
        if given is not None and given.value != value:
            yield f"{name} is {given.value}: must be {value}"
    for index in operator.constant:
        if index < len(node.inputs) and not _is_constant(node.inputs[index]):
            yield f"input {index} must be a constant"
    if node.op_type == "Squeeze" and len(node.inputs) == 1:
        yield "names no axes, and lengths are open"
    if any(value.uses() or value.is_graph_output() for value in node.outputs[operator.outputs :]):
        yield f"only {operator.outputs} of its outputs can be used"
    yield from _types(node, operator)


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or ir.convenience.get_const_tensor(value) is not None


def _types(node: ir.Node, operator: Operator) -> Iterator[str]:
    """Types of data that are not in the table (or not known)."""
    data = [v for i, v in enumerate(node.inputs) if v is not None and i not in operator.constant]
    if node.op_type in _MAKES_ITS_TYPE:
        data.append(node.outputs[0])
    for value in data:
        name = value.dtype.name if value.dtype is not None else "unknown"
        if name not in operator.types:
            yield f"{value.name} is of type {name}"
