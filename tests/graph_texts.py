"""Graphs written as text: read with their shapes, run in ONNX Runtime, compared as text."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from vtr_export import ops
from vtr_export.errors import AnalysisError

Array = np.ndarray[Any, Any]
HEADER = '<ir_version: 11, opset_import: ["": 24, "vtr": 1]>'
TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def read(text: str, choice: ops.Choice | None = None) -> ir.Model:
    """A checked model; our operators declared, every shape inferred that can be."""
    model = ir.from_onnx_text(text)
    for node in list(model.graph):
        if node.domain == ops.DOMAIN:
            ops.declare(model, node.op_type, choice)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    ShapeInferencePass()(model)
    for node in model.graph:
        ir.convenience.get_const_tensor(node.outputs[0])  # names the tensor when it is first asked
    return model


def graph(signature: str, body: str, choice: ops.Choice | None = None) -> ir.Model:
    """``(inputs) => (outputs) <values>`` and nodes."""
    return read(f"{HEADER} graph {signature} {{ {body} }}", choice)


def load(path: Path, choice: ops.Choice | None = None) -> ir.Model:
    """The model in a text file."""
    return read(path.read_text(encoding="utf-8"), choice)


class Session:
    """A checked model in ONNX Runtime."""

    def __init__(self, model: ir.Model) -> None:
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Outputs by name; feeds that the graph does not take are left out."""
        given = {name: array for name, array in feeds.items() if name in self.inputs}
        return dict(zip(self.outputs, self.session.run(None, given), strict=True))


def run(model: ir.Model, feeds: dict[str, Array]) -> dict[str, Array]:
    """One call."""
    return Session(model)(feeds)


def op_types(model: ir.Model) -> list[str]:
    """In the order of the graph."""
    return [node.op_type for node in model.graph]


def text_of(model: ir.Model) -> str:
    """Everything, to compare a model with itself."""
    return ir.to_onnx_text(model)


def names(model: ir.Model) -> Iterator[str | None]:
    """Of every value that a node makes."""
    return (value.name for node in model.graph for value in node.outputs)


def bind(model: ir.Model, weights: Mapping[str, ir.TensorProtocol]) -> None:
    """Inputs become initializers."""
    for value in list(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = weights[value.name]
            model.graph.initializers[value.name] = value


def swept(model: ir.Model) -> list[str]:
    """What is left without nodes that nobody reads."""
    RemoveUnusedNodesPass()(model)
    return op_types(model)


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def applied(
    step: ir.passes.InPlacePass, model: ir.Model, feeds: Mapping[str, Array], atol: float = 1e-6
) -> ir.Model:
    """Apply ``step``: the outputs stay, and a second time changes nothing."""
    expected = run(model, dict(feeds))
    assert step(model).modified
    again = ir.to_onnx_text(model)
    assert not step(model).modified
    assert ir.to_onnx_text(model) == again
    actual = run(model, dict(feeds))
    assert list(actual) == list(expected)
    for name, wanted in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_allclose(actual[name], wanted, atol=atol, rtol=1e-5)
    return model


def untouched(step: ir.passes.InPlacePass, model: ir.Model) -> None:
    """``step`` leaves ``model`` alone, and says so."""
    was = ir.to_onnx_text(model)
    assert not step(model).modified
    assert ir.to_onnx_text(model) == was


def refused(step: ir.passes.InPlacePass, model: ir.Model, words: str) -> None:
    was = ir.to_onnx_text(model)
    with pytest.raises(AnalysisError, match=words) as caught:
        step(model)
    assert caught.value.hint
    assert ir.to_onnx_text(model) == was
