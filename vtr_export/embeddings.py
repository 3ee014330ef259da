"""The embedding table of an artifact as a file that numpy maps: looking up needs no engine."""

from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike, NDArray

from vtr_export.errors import EngineError

CHUNK_BYTES: Final = 64 << 20
DTYPES: Final[dict[str, DTypeLike]] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}


def write_table(graph: Path, file: Path, dtype: str, weights: dict[str, Path]) -> None:
    """Write the table ``[vocab, D]`` that ``graph`` looks rows up in, piece by piece.

    ``weights``: files of linked weights by location. bf16 is stored as its bits, in uint16. Raises
    EngineError for a graph that does more than look up.
    """
    found = _table(ir.load(graph))
    if found is None:
        raise EngineError(
            "the embedding graph does more than look rows up",
            where=str(graph),
            hint="report the model: its embeddings cannot be stored as a table yet",
        )
    table, scale = found
    rows = _rows(table, weights)
    wanted = np.dtype(DTYPES[dtype])
    stored = np.dtype(np.uint16) if dtype == "bf16" else wanted
    shape = tuple(int(size) for size in rows.shape)
    written = np.lib.format.open_memmap(file, "w+", stored, shape)
    step = max(1, CHUNK_BYTES // max(1, wanted.itemsize * shape[1]))
    for start in range(0, shape[0], step):
        part = np.asarray(rows[start : start + step]).astype(wanted)
        part = part if scale is None else part * scale.astype(wanted)
        written[start : start + step] = part.view(stored)
    written.flush()


def _table(model: ir.Model) -> tuple[ir.TensorProtocol, NDArray[Any] | None] | None:
    """What a Gather of rows reads, and the number that rows are multiplied by, if any.

    Casts of the table, or of what it gives, change no value.
    """
    nodes = {kind: [n for n in model.graph if n.op_type == kind] for kind in ("Gather", "Mul")}
    others = {n.op_type for n in model.graph} - {*nodes, "Cast", "Constant", "Identity"}
    if len(nodes["Gather"]) != 1 or len(nodes["Mul"]) > 1 or others:
        return None
    table = _constant(nodes["Gather"][0].inputs[0])
    if table is None or not nodes["Mul"]:
        return None if table is None else (table, None)
    factors = [found for v in nodes["Mul"][0].inputs if (found := _constant(v)) is not None]
    scale = factors[0].numpy() if factors else None
    return None if scale is None or scale.size != 1 else (table, scale.reshape(()))


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Where casts of a constant lead back to."""
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type not in ("Cast", "Identity"):
            return ir.convenience.get_const_tensor(value)
        value = producer.inputs[0]
    return None if value is None else value.const_value


def _rows(table: ir.TensorProtocol, weights: dict[str, Path]) -> NDArray[Any]:
    """The table as it lies on the disk, mapped."""
    if not isinstance(table, ir.ExternalTensor) or table.location not in weights:
        return table.numpy()
    shape = tuple(int(size) for size in table.shape.numpy())
    return np.memmap(weights[table.location], table.dtype.numpy(), "r", table.offset or 0, shape)
