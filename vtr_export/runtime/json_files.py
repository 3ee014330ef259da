"""The JSON files that lie beside a model's graphs."""

import json
from pathlib import Path
from typing import Any, Final

from vtr_export.errors import ArtifactError

_AGAIN: Final = "take the file from the checkpoint again"


def read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``; empty when there is no such file. ArtifactError when it is none."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"not valid JSON: {error}", where=str(file), hint=_AGAIN) from error
    if not isinstance(data, dict):
        raise ArtifactError("not a JSON object", where=str(file), hint=_AGAIN)
    return data
