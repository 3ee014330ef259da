"""What a foreign graph may be: looked at before anything else reads it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it ships no types

MAX_BYTES: Final = (1 << 31) - 1  # protobuf's own limit
MAX_NODES: Final = 500_000
MAX_DEPTH: Final = 8  # graphs within graphs
MAX_INPUTS: Final = 20_000
DOMAINS: Final = ("", "ai.onnx", "com.microsoft")
FORBIDDEN: Final = ("EPContext", "PythonOp", "PythonOpGrad")
IN_STANDARD: Final = ("SimplifiedLayerNormalization",)  # ONNX Runtime's, in the standard's domain
HINT: Final = "export the decoder again, for stock ONNX Runtime"


class RefusedError(Exception):
    """Why a file is not read any further, and the way out."""

    def __init__(self, message: str, hint: str = HINT) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


def examine(file: Path) -> dict[str, Any]:
    """Facts of a model that may be read, without its weights; RefusedError for any other."""
    size_bytes = file.stat().st_size
    if size_bytes > MAX_BYTES:
        raise RefusedError(f"it has {size_bytes:,} bytes, more than {MAX_BYTES:,}")
    try:
        model = onnx.load(str(file), load_external_data=False)
    except DecodeError:
        raise RefusedError("it is no ONNX model") from None
    _check_size(model)
    _check_domains(model)
    external = sorted(set(_locations(model, file.parent)))
    _check_standard(model)
    return {
        "bytes": size_bytes,
        "nodes": len(model.graph.node),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opset": {entry.domain: entry.version for entry in model.opset_import},
        "external": external,
    }


def _nodes(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Every node, and how deep it lies."""
    stack: list[tuple[Any, int]] = [(model.graph.node, 0)]
    stack += [(function.node, 0) for function in model.functions]
    while stack:
        nodes, depth = stack.pop()
        for node in nodes:
            yield node, depth
            for attribute in node.attribute:
                inner = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
                stack += [(graph.node, depth + 1) for graph in inner]


def _check_size(model: onnx.ModelProto) -> None:
    for number, (node, depth) in enumerate(_nodes(model)):
        if number >= MAX_NODES:
            raise RefusedError(f"it has more than {MAX_NODES:,} nodes")
        if depth > MAX_DEPTH:
            raise RefusedError(f"its graphs lie more than {MAX_DEPTH} deep in one another")
        if len(node.input) > MAX_INPUTS or len(node.output) > MAX_INPUTS:
            raise RefusedError(f"node {node.name!r} has more than {MAX_INPUTS:,} inputs or outputs")


def _check_domains(model: onnx.ModelProto) -> None:
    functions = {(each.domain, each.name) for each in model.functions}
    for node, _ in _nodes(model):
        if node.op_type in FORBIDDEN:
            raise RefusedError(
                f"node {node.name!r} is an {node.op_type}: compiled for one device",
                "give the graph it was compiled from",
            )
        if node.domain not in DOMAINS and (node.domain, node.op_type) not in functions:
            raise RefusedError(
                f"node {node.name!r} is of the unknown domain {node.domain!r}",
                "only operators of ONNX and com.microsoft, and functions in the file, are known",
            )


def _locations(model: onnx.ModelProto, folder: Path) -> Iterator[str]:
    """Files with weights, each inside ``folder`` and long enough."""
    home = Path(os.path.realpath(folder))
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        name = said.get("location", "")
        file = Path(os.path.realpath(folder / name))
        if not name or Path(name).is_absolute() or not file.is_relative_to(home):
            raise RefusedError(
                f"the weights of {tensor.name!r} lie outside its folder, at {name!r}",
                "put graph and weights into one folder (a copy, not a link)",
            )
        if not file.is_file():
            raise RefusedError(
                f"the file {name!r} with its weights is missing", "copy it there too"
            )
        end = _whole(said, "offset", tensor) + _whole(said, "length", tensor)
        if end > file.stat().st_size:
            raise RefusedError(f"the file {name!r} ends before the weights of {tensor.name!r}")
        yield name


def _whole(said: dict[str, str], key: str, tensor: onnx.TensorProto) -> int:
    text = said.get(key, "0")
    if not text.isdecimal():
        raise RefusedError(f"the {key} of {tensor.name!r} is {text!r}, no number of bytes")
    return int(text)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node, _ in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (*attribute.graphs, attribute.g):
                yield from graph.initializer


def _check_standard(model: onnx.ModelProto) -> None:
    """``onnx.checker``, external weights made inputs: it need not look for their files."""
    known = {value.name for value in model.graph.input}
    kept = []
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            kept.append(tensor)
        elif tensor.name not in known:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            model.graph.input.append(info)
    kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for node, _ in _nodes(model):
        if node.op_type in IN_STANDARD:
            node.domain = "com.microsoft"
    if not any(entry.domain == "com.microsoft" for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, TypeError) as error:
        raise RefusedError(str(error).strip().splitlines()[0]) from None
