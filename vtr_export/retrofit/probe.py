"""What a part of a graph computes: run it, instead of recognising how it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vtr_export.errors import AnalysisError, UnavailableError

Array: TypeAlias = NDArray[Any]
SMALL = 64  # entries; what has more is a table
MAX_BYTES = 64 << 20  # of constants that a part may read: more is a weight


@dataclass(frozen=True)
class Lengths:
    """A call: ``padding`` [B,T] tells real tokens, the last ``new`` of them are this call's."""

    padding: Array
    new: int

    @property
    def past(self) -> int:
        """Tokens before this call's."""
        return int(self.padding.shape[1]) - self.new

    @classmethod
    def drawn(cls, batch: int, past: int, new: int, pads: Sequence[int] = ()) -> "Lengths":
        """``pads`` at the left of each row."""
        padding = np.ones((batch, past + new), np.int64)
        for row, count in enumerate(pads):
            padding[row, :count] = 0
        return cls(padding, new)


class Part:
    """The nodes that ``values`` are computed from, in a session of their own."""

    def __init__(self, model: ir.Model, values: Sequence[ir.Value]) -> None:
        self.names = [_name(value) for value in values]
        self.model = _extract(model, values)
        self.inputs = list(self.model.graph.inputs)
        try:
            self.session = session(ir.to_proto(self.model).SerializeToString())
        except UnavailableError:
            raise
        except Exception as error:  # ONNX Runtime has no class of its own for what a graph is
            raise AnalysisError(
                f"{self.names[0]!r} cannot be computed by itself: {str(error).splitlines()[0]}",
                hint="export the decoder with attention_mask and position_ids as inputs",
            ) from None

    def constants(self) -> list[int]:
        """Whole numbers that the part reads: a window would be one of them."""
        found: set[int] = set()
        for tensor in self._tensors():
            if tensor.size <= SMALL:
                entries = np.asarray(tensor.numpy(), dtype=np.float64).reshape(-1)
                found |= {int(abs(x)) for x in entries if np.isfinite(x) and x == np.round(x)}
        return sorted(found)

    def tables(self) -> list[int]:
        """Lengths of tables that the part reads: all of a table is read at one of them."""
        large = [tensor for tensor in self._tensors() if tensor.size > SMALL]
        return sorted(
            {int(dim) for tensor in large for dim in tensor.shape if isinstance(dim, int)}
        )

    def _tensors(self) -> list[ir.TensorProtocol]:
        graph = self.model.graph
        tensors = [value.const_value for value in graph.initializers.values()]
        tensors += [ir.convenience.get_const_tensor(node.outputs[0]) for node in graph]
        text = ir.DataType.STRING
        return [tensor for tensor in tensors if tensor is not None and tensor.dtype != text]

    def __call__(self, lengths: Lengths) -> list[Array]:
        """The values for a call; hidden states and past are zeros."""
        return self.run({_name(value): _feed(value, lengths) for value in self.inputs})

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The values for inputs."""
        try:
            return list(self.session.run(self.names, dict(feeds)))
        except Exception as error:  # ONNX Runtime has no class of its own for what a graph does
            raise AnalysisError(
                f"{self.names[0]!r} cannot be computed: {str(error).splitlines()[0]}",
                hint="export the decoder with symbolic lengths",
            ) from None


def session(model: bytes | str, *, optimise: bool = False) -> Any:
    """ONNX Runtime on the CPU. UnavailableError where it is not installed."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "comparing graphs needs ONNX Runtime", hint="pip install 'vtr-export[cpu]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimise:
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _extract(model: ir.Model, values: Sequence[ir.Value]) -> ir.Model:
    """A copy of the part, its constants with it."""
    graph = model.graph
    starts = {value for value in graph.inputs if value.name}
    nodes = _ancestors(values)
    copies: dict[ir.Value, ir.Value] = {}
    inputs, initializers = [], []
    for node in nodes:
        for value in node.inputs:
            if value is None or value in copies or value.producer() in nodes:
                continue
            copies[value] = _bare(value)
            if value in starts:
                inputs.append(copies[value])
            else:
                initializers.append(_read(value, copies[value]))
    made = [_copy(node, copies) for node in graph if node in nodes]
    for value in values:
        if value not in copies:
            raise AnalysisError(
                f"{value.name!r} is no result of a node",
                hint="give it to the graph as attention_mask and position_ids",
            )
    part = ir.Graph(
        inputs,
        [copies[value] for value in values],
        nodes=made,
        initializers=initializers,
        opset_imports=dict(graph.opset_imports),
        name="part",
    )
    return ir.Model(part, ir_version=10, functions=list(model.functions.values()))


def _ancestors(values: Sequence[ir.Value]) -> dict[ir.Node, None]:
    found: dict[ir.Node, None] = {}
    stack = [value.producer() for value in values]
    while stack:
        node = stack.pop()
        if node is None or node in found:
            continue
        found[node] = None
        stack.extend(value.producer() for value in node.inputs if value is not None)
    return found


def _copy(node: ir.Node, copies: dict[ir.Value, ir.Value]) -> ir.Node:
    inputs = [copies[value] if value is not None else None for value in node.inputs]
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name = old.name
        copies[old] = new
    return copy


def _bare(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=value.type, shape=value.shape)


def _read(value: ir.Value, copy: ir.Value) -> ir.Value:
    tensor = value.const_value
    if tensor is None or tensor.nbytes > MAX_BYTES:
        raise AnalysisError(
            f"{value.name!r} is too large to be a table of masks or positions",
            hint="export the decoder with attention_mask and position_ids as inputs",
        )
    copy.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
    return copy


def _feed(value: ir.Value, lengths: Lengths) -> Array:
    """What a graph's input gets: its role is told by its name and rank."""
    batch = lengths.padding.shape[0]
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    name = _name(value)
    if name == "attention_mask":
        return lengths.padding.astype(dtype)
    if name == "position_ids":
        return positions(lengths, len(value.shape or (0, 0))).astype(dtype)
    shape = list(value.shape or ())
    if name in ("inputs_embeds", "input_ids"):
        rest = [int(str(dim)) if str(dim).isdecimal() else 1 for dim in shape[2:]]
        return np.zeros([batch, lengths.new, *rest], dtype)
    return np.zeros(cache_sizes(shape, batch, lengths.past), dtype)


def cache_sizes(shape: Sequence[object], batch: int, past: int) -> list[int]:
    """Sizes of a cache: of two open dimensions the first counts rows, the other tokens."""
    open_axes = [axis for axis, dim in enumerate(shape) if not str(dim).isdecimal()]
    counts = [batch, past] if len(open_axes) > 1 else [past]
    sizes = dict(zip(open_axes, [*counts, *[1] * len(shape)], strict=False))
    return [sizes[axis] if axis in sizes else int(str(dim)) for axis, dim in enumerate(shape)]


def positions(lengths: Lengths, width: int = 2) -> Array:
    """[B,S] or [3,B,S]: how many real tokens stand before each of this call's."""
    counted = np.maximum(np.cumsum(lengths.padding, 1) - 1, 0)[:, lengths.past :]
    return np.broadcast_to(counted, (3, *counted.shape)) if width == 3 else counted


def visible(lengths: Lengths) -> Array:
    """[B,S,T]: the mask that a cut can rebuild: causal from the lower right, blind to padding."""
    total = lengths.padding.shape[1]
    rows, keys = np.arange(lengths.past, total)[:, None], np.arange(total)[None]
    seen: Array = (keys <= rows)[None] & (lengths.padding[:, None] != 0)
    return seen


def _name(value: ir.Value) -> str:
    return value.name or ""
