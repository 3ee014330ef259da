"""What a vision encoder reads of a prompt: its own tokens of it, by its own tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vtr_export.errors import InputError
from vtr_export.runtime.text import Tokenizer

FOLDER: Final = "qformer_tokenizer"  # of the second tokenizer, beside the model's own
READ: Final = ("qformer_input_ids", "qformer_attention_mask")


class Reader:
    """Texts as the feeds ``READ``."""

    def __init__(self, tokenizer: Tokenizer, most: int) -> None:
        self._tokenizer, self._most = tokenizer, most
        pad = tokenizer.special.get("pad_token", "[PAD]")
        self._pad = tokenizer.id_of(pad) or 0

    @classmethod
    def load(cls, folder: Path, most: int) -> "Reader":
        """``most`` tokens may be read. ArtifactError where the tokenizer is missing or broken."""
        return cls(Tokenizer.load(folder / FOLDER), most)

    def feeds(self, texts: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        """``[texts, tokens]`` each, padded behind: positions count from the first column."""
        rows = [self._tokenizer.encode(text) for text in texts]
        length = max(map(len, rows))
        if length > self._most:
            raise InputError(
                f"the vision encoder reads {self._most} tokens of a prompt, this one has {length}",
                hint="ask in fewer words",
            )
        ids = [row + [self._pad] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return dict(zip(READ, (np.array(ids, np.int64), np.array(mask, np.int64)), strict=True))
