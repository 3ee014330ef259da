"""Ids of a tokenizer's added tokens, from whichever file lists them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

START, IMAGE, END = "<img>", "<IMG_CONTEXT>", "</img>"
FILES: Final = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none: other steps say what a file lacks."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def token_ids(folder: Path) -> dict[str, int]:
    """Added token → id."""
    return dict(pair for name in FILES for pair in _listed(read_object(folder / name)))


def _listed(data: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for token in data.get("added_tokens") or ():
        yield token["content"], int(token["id"])
    for number, token in (data.get("added_tokens_decoder") or {}).items():
        yield token["content"], int(number)
    for text, number in data.items():
        if type(number) is int:
            yield text, number
