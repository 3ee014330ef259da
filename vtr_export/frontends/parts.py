"""A parameter that the checkpoint stores in parts, such as the experts of a mixture one by one."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from vtr_export.checkpoint import TensorRef
from vtr_export.weights import CheckpointTensor


@dataclass(frozen=True)
class Parts:
    """``parts`` behind each other along ``axis``, then laid out as ``shape``.

    A mixture's weight is each expert's parts, such as its gate and its up, expert by expert; or
    the parts of all experts at once [experts, rows, columns], behind each other in rows.
    """

    parts: tuple[TensorRef, ...]
    axis: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the first part, for people."""
        return self.parts[0].name

    @property
    def shard(self) -> Path:
        """Of the first part, for people."""
        return self.parts[0].shard

    @property
    def dtype(self) -> str:
        """Of the first part."""
        return self.parts[0].dtype

    def build(self, graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
        """Let ``value`` of ``graph`` be put together from its parts, which stay as they are."""
        inputs = [
            _initializer(graph, f"{value.name}.{n}", part, dtype)
            for n, part in enumerate(self.parts)
        ]
        flat = ir.Node("", "Concat", inputs, [ir.AttrInt64("axis", self.axis)])
        flat.outputs[0].name = f"{value.name}.flat"
        shape = np.array(self.shape, np.int64)
        target = ir.val(
            f"{value.name}.shape", const_value=ir.tensor(shape, name=f"{value.name}.shape")
        )
        graph.register_initializer(target)
        node = ir.Node("", "Reshape", [flat.outputs[0], target])
        made = node.outputs[0]
        made.shape, made.type = ir.Shape(self.shape), ir.TensorType(dtype)
        value.replace_all_uses_with(made)
        graph.initializers.pop(str(value.name))
        made.name = value.name
        graph.insert_before(graph[0], [flat, node])


Stored: TypeAlias = TensorRef | Parts


def _initializer(graph: ir.Graph, name: str, ref: TensorRef, dtype: ir.DataType) -> ir.Value:
    tensor = CheckpointTensor(ref, name=name, dtype=dtype)
    value = ir.Value(
        name=name, shape=ir.Shape(ref.shape), type=ir.TensorType(dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value
