"""Numbers that a graph computes from numbers: computed once, weights left alone."""

from typing import Final

import numpy as np
import onnx_ir as ir

from vtr_export.errors import AnalysisError
from vtr_export.retrofit.probe import Array, Part

SMALL: Final = 1024  # entries; what is larger stays computed
RANDOM: Final = {
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike",
}  # fmt: skip


def fold(model: ir.Model) -> None:
    """Replace each small value that follows from constants, and known dimensions, by a constant."""
    graph = model.graph
    for node in graph:
        if _is_shape(node) and (known := _dimensions(node)) is not None:
            _set(graph, node.outputs[0], np.array(known, np.int64))
    constant: set[ir.Value] = set()
    for node in graph:
        if _is_foldable(node, constant):
            constant |= set(node.outputs)
    wanted = [value for value in constant if _is_read(value, constant)]
    try:
        found = Part(model, wanted).run({}) if wanted else []
    except AnalysisError:
        return  # what cannot be computed ahead stays as it is
    for value, array in zip(wanted, found, strict=True):
        if array.size <= SMALL:
            _set(graph, value, array)


def _is_shape(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type == "Shape"


def _dimensions(node: ir.Node) -> list[int] | None:
    """What ``Shape`` gives, where every dimension it asks for is a number."""
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    bounds = (node.attributes.get(name) for name in ("start", "end"))
    asked = list(value.shape)[slice(*(bound.as_int() if bound else None for bound in bounds))]
    whole = [dim for dim in asked if isinstance(dim, int)]
    return whole if len(whole) == len(asked) else None


def _is_foldable(node: ir.Node, constant: set[ir.Value]) -> bool:
    """Whether ``node`` reads small constants only, and at least one."""
    if node.domain != "" or node.op_type in RANDOM or node.op_type == "Constant":
        return False
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    if any(attribute.type in kinds for attribute in node.attributes.values()):
        return False
    inputs = [value for value in node.inputs if value is not None]
    return bool(inputs) and all(value in constant or _is_small(value) for value in inputs)


def _is_small(value: ir.Value) -> bool:
    """A constant of the graph that takes no reading to know how small it is."""
    if value.is_graph_input():
        return False
    producer = value.producer()
    if producer is None:
        return value.const_value is not None and value.const_value.size <= SMALL
    tensor = ir.convenience.get_const_tensor(value)
    return producer.op_type == "Constant" and tensor is not None and tensor.size <= SMALL


def _is_read(value: ir.Value, constant: set[ir.Value]) -> bool:
    """Whether a node that is not constant itself reads ``value``."""
    return any(output not in constant for use in value.uses() for output in use.node.outputs)


def _set(graph: ir.Graph, value: ir.Value, array: Array) -> None:
    producer = value.producer()
    assert producer is not None
    tensor = ir.tensor(array, name=f"{value.name}.folded")
    node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)])
    new = node.outputs[0]
    new.name, new.const_value = tensor.name, tensor
    new.type, new.shape = ir.TensorType(tensor.dtype), ir.Shape(list(array.shape))
    graph.insert_before(producer, node)
    value.replace_all_uses_with(new)
