"""A parameter that the checkpoint stores in parts: the experts of a mixture, one by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from vtr_export.checkpoint import TensorRef
from vtr_export.weights import CheckpointTensor


@dataclass(frozen=True)
class Parts:
    """``rows[e]``: what stands under each other in expert e, such as its gate and its up.

    Where each part is of all experts already [experts, rows, columns], there is one row.
    """

    rows: tuple[tuple[TensorRef, ...], ...]

    @classmethod
    def of(cls, found: Mapping[tuple[int, int], TensorRef]) -> "Parts | None":
        """From (expert, part) → tensor; None where one is missing."""
        experts, parts = (max(key[axis] for key in found) + 1 for axis in (0, 1))
        if len(found) != experts * parts:
            return None
        return cls(tuple(tuple(found[e, p] for p in range(parts)) for e in range(experts)))

    @property
    def _first(self) -> TensorRef:
        return self.rows[0][0]

    @property
    def is_stacked(self) -> bool:
        """Whether each part is of all experts."""
        return len(self._first.shape) == 3

    @property
    def name(self) -> str:
        """Of the first part, for people."""
        return self._first.name

    @property
    def shard(self) -> Path:
        """Of the first part, for people."""
        return self._first.shard

    @property
    def dtype(self) -> str:
        """Of the first part."""
        return self._first.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """[experts, rows, columns]."""
        if self.is_stacked:
            high = sum(part.shape[1] for part in self.rows[0])
            return (self._first.shape[0], high, *self._first.shape[2:])
        high = sum(part.shape[0] for part in self.rows[0])
        return (len(self.rows), high, *self._first.shape[1:])

    def build(self, graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
        """Let ``value`` of ``graph`` be put together from its parts, which stay as they are."""
        parts = [part for row in self.rows for part in row]
        inputs = [
            _initializer(graph, f"{value.name}.{n}", part, dtype) for n, part in enumerate(parts)
        ]
        flat = ir.Node("", "Concat", inputs, [ir.AttrInt64("axis", int(self.is_stacked))])
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
