"""A text file is written whole or not at all."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from vtr_export.errors import InputError


def write_text(path: Path, text: str, what: str) -> None:
    """Old or new, never a part. ``what`` begins the InputError where it cannot be written."""
    staged = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        raise InputError(
            f"{what} cannot be written: {error.strerror or error}",
            where=str(path),
            hint="give a file in a folder that exists and may be written to",
        ) from None
    finally:
        with suppress(OSError):  # it has become ``path``, or there is no such folder
            staged.unlink()
