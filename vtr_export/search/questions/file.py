"""Questions about images as JSON Lines: one object a line, every line checked."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

from vtr_export.errors import CalibrationError

Problem: TypeAlias = tuple[int, str]  # line, what is wrong

SHOWN: Final = 5
EXAMPLE: Final = '{"image": "images/1.png", "question": "how many?", "answers": ["3"]}'
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """One line as it is written; nothing else was looked at. Other keys are the user's own."""

    number: int
    images: tuple[str, ...]
    text: str
    answers: tuple[str, ...]


class _RefusedError(Exception):
    """What is wrong with a line."""


def find_file(path: Path) -> Path:
    """``path``, or the only ``*.jsonl`` in the folder ``path``. Raises CalibrationError."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CalibrationError(
            "no such calibration file or folder",
            where=str(path),
            hint=f"give a JSONL file with lines like {EXAMPLE}, or the folder that holds it",
        )
    found = sorted(file for file in path.glob("*.jsonl") if not file.name.startswith("."))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:SHOWN])
        raise CalibrationError(
            f"the folder holds {len(found)} JSONL files ({names})" if found else "no JSONL file",
            where=str(path),
            hint="give the file itself" if found else f"write a *.jsonl with lines like {EXAMPLE}",
        )
    return found[0]


def read_lines(file: Path, labels: bool) -> tuple[list[Line], list[Problem]]:
    """The lines that are well-formed, and what is wrong with the others; empty lines count.

    ``labels`` asks for answers. Raises CalibrationError when ``file`` cannot be read.
    """
    lines, problems = [], []
    try:
        with file.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if not raw.strip():
                    continue
                try:
                    lines.append(_parse(number, raw, labels))
                except _RefusedError as error:
                    problems.append((number, str(error)))
    except OSError as error:
        message, hint = f"cannot be read: {error.strerror}", "check the file and its permissions"
        raise CalibrationError(message, where=str(file), hint=hint) from error
    if not lines and not problems:
        raise CalibrationError(
            "the calibration file holds no question",
            where=str(file),
            hint=f"write one a line: {EXAMPLE}",
        )
    return lines, problems


def refuse(problems: Iterable[Problem], file: Path) -> NoReturn:
    """Raise CalibrationError that names the first few problems by line, and counts the others."""
    found = sorted(problems)
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    lines = [f"line {number}: {what}" for number, what in found[:SHOWN]] + more
    count = "a problem" if len(found) == 1 else f"{len(found)} problems"
    raise CalibrationError(
        "\n    ".join([f"{count} in the calibration file", *lines]),
        where=f"{file}:{found[0][0]}",
        hint=f"a good line: {EXAMPLE}",
    )


def _parse(number: int, raw: bytes, labels: bool) -> Line:
    data = _decode(raw.removeprefix(_BOM) if number == 1 else raw)
    for one, several in (("image", "images"), ("answer", "answers")):
        if one in data and several in data:
            raise _RefusedError(f"both {one!r} and {several!r}: keep one")
    text = data.get("question")
    if text is None or text == "":
        raise _RefusedError(f"no question ({_keys(data)})")
    if not isinstance(text, str) or not text.strip():
        raise _RefusedError(f"the question is {_show(text)}, not text")
    images = _texts(data, "image", "images")
    if not images:
        raise _RefusedError(f"no image ({_keys(data)})")
    return Line(number, images, text, _answers(data, labels))


def _answers(data: dict[str, Any], labels: bool) -> tuple[str, ...]:
    answers = _texts(data, "answer", "answers")
    if not labels:  # test splits write "" for what they keep to themselves
        return tuple(answer for answer in answers if answer.strip())
    if not answers:
        raise _RefusedError(f"no answers, and the metric needs them ({_keys(data)})")
    if not all(answer.strip() for answer in answers):
        raise _RefusedError("an answer is empty")
    return answers


def _texts(data: dict[str, Any], one: str, several: str) -> tuple[str, ...]:
    key = several if several in data else one
    value = data.get(key)
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, str):
            raise _RefusedError(f"{key!r} holds {_show(item)}, not text in quotes")
    return tuple(values)


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except UnicodeError as error:
        raise _RefusedError("not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise _RefusedError(f"not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise _RefusedError(f"not JSON that can be read: {error}") from error
    if not isinstance(data, dict):
        raise _RefusedError(f"{_show(data)}, not a JSON object")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise _RefusedError("a key stands twice in one object")
    return data


def _keys(data: dict[str, Any]) -> str:
    return f"its keys: {', '.join(map(repr, data))}"[:200] if data else "it has no keys"


def _show(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 40 else f"{shown[:39]}…"
