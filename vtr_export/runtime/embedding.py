"""The embedding table of an engine folder: a session that needs numpy alone."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from vtr_export.errors import EngineError, InputError
from vtr_export.runtime import bfloat16
from vtr_export.runtime.session import Port, Value

INPUT, OUTPUT = "input_ids", "inputs_embeds"


class EmbeddingTable:
    """``[vocab, D]``, mapped: only the rows that are asked for are read."""

    def __init__(self, file: Path) -> None:
        """Bits of bfloat16 lie there as uint16. EngineError for a file that is no such table."""
        try:
            self._table = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _no_table(str(error), file) from error
        if self._table.ndim != 2 or self._table.dtype not in (np.uint16, np.float16, np.float32):
            raise _no_table(f"it holds {self._table.dtype} {self._table.shape}", file)
        self._is_bits = self._table.dtype == np.uint16
        vocab, width = self._table.shape
        self.vocab = int(vocab)
        dtype = "bfloat16" if self._is_bits else str(self._table.dtype)
        self.inputs = {INPUT: Port(INPUT, ("batch", "sequence"), "int64")}
        self.outputs = {OUTPUT: Port(OUTPUT, ("batch", "sequence", int(width)), dtype)}

    def run(
        self,
        feeds: Mapping[str, Value],
        outputs: Sequence[str] | None = None,
        *,
        resident: Collection[str] = (),
    ) -> dict[str, Value]:
        """Ids ``[B, S]`` to rows ``[B, S, D]``, bfloat16 as float32. InputError for no such id."""
        ids = np.asarray(feeds[INPUT])
        wrong = ids[(ids < 0) | (ids >= self.vocab)]
        if wrong.size:
            raise InputError(
                f"{wrong[0]} is no token: the model knows {self.vocab}",
                hint="the tokenizer's file belongs to another checkpoint",
            )
        rows = self._table[ids]
        return {OUTPUT: bfloat16.from_bits(rows) if self._is_bits else np.asarray(rows)}


def _no_table(why: str, file: Path) -> EngineError:
    return EngineError(
        f"no embedding table: {why}", where=str(file), hint="build it again: vtr build ARTIFACT"
    )
