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
    table = _table(ir.load(graph))
    if table is None:
        raise EngineError(
            "the embedding graph does more than look rows up",
            where=str(graph),
            hint="report the model: its embeddings cannot be stored as a table yet",
        )
    rows = _rows(table, weights)
    wanted = np.dtype(DTYPES[dtype])
    stored = np.dtype(np.uint16) if dtype == "bf16" else wanted
    shape = tuple(int(size) for size in rows.shape)
    written = np.lib.format.open_memmap(file, "w+", stored, shape)
    step = max(1, CHUNK_BYTES // max(1, wanted.itemsize * shape[1]))
    for start in range(0, shape[0], step):
        part = np.asarray(rows[start : start + step]).astype(wanted)
        written[start : start + step] = part.view(stored)
    written.flush()


def _table(model: ir.Model) -> ir.TensorProtocol | None:
    """What a Gather of rows reads; casts of it, or of what it gives, change no value."""
    gathers = [node for node in model.graph if node.op_type == "Gather"]
    others = {node.op_type for node in model.graph} - {"Gather", "Cast", "Constant", "Identity"}
    if len(gathers) != 1 or others:
        return None
    value = gathers[0].inputs[0]
    while value is not None and (producer := value.producer()) is not None:
        value = producer.inputs[0]
    return None if value is None else value.const_value


def _rows(table: ir.TensorProtocol, weights: dict[str, Path]) -> NDArray[Any]:
    """The table as it lies on the disk, mapped."""
    if not isinstance(table, ir.ExternalTensor) or table.location not in weights:
        return table.numpy()
    shape = tuple(int(size) for size in table.shape.numpy())
    return np.memmap(weights[table.location], table.dtype.numpy(), "r", table.offset or 0, shape)
