"""A tokenizer of older files (a vocabulary and its merges) as ``tokenizer.json``."""

from pathlib import Path
from typing import Any, Final

TOKENIZER: Final = "tokenizer.json"
OLDER: Final = ("vocab.json", "tokenizer.model", "vocab.txt")


def write_tokenizer(checkpoint: Path, folder: Path) -> list[str]:
    """Write ``tokenizer.json`` into ``folder`` as transformers converts the checkpoint's files.

    Nothing is written where there are none; a warning is returned where they cannot be converted,
    or the checkpoint's own code alone reads them.
    """
    found = [name for name in OLDER if (checkpoint / name).is_file()]
    if not found:
        return []
    from transformers import AutoTokenizer

    try:
        own: Any = AutoTokenizer.from_pretrained(
            checkpoint, local_files_only=True, trust_remote_code=False
        )
        own.backend_tokenizer.save(str(folder / TOKENIZER))
    except Exception as error:  # the tokenizers library raises nothing narrower
        return [f"{TOKENIZER} could not be made of {found[0]}: {error}"]
    return []
