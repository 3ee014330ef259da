"""YAML without its surprises, and with the line of every value."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from vtr_export.errors import ScheduleError

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 16
MAX_DIGITS: Final = 18

Key = tuple[str | int, ...]

_INTEGER: Final = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT: Final = re.compile(
    r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.nan"
)
_WORDS: Final[Mapping[str, bool | None]] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
}


@dataclass(frozen=True)
class Source:
    """Where a schedule comes from: a name and, for text, the line of every key."""

    name: str = "<schedule>"
    lines: Mapping[Key, int] = field(default_factory=dict)

    def at(self, key: Key) -> str:
        """``file:line: prefill.keep[3]``; a key that is absent is looked for in its parent."""
        known = next((key[:n] for n in range(len(key), -1, -1) if key[:n] in self.lines), None)
        place = self.name if known is None else f"{self.name}:{self.lines[known]}"
        dotted = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in key).lstrip(".")
        return f"{place}: {shorten(dotted)}" if dotted else place


def shorten(text: str, limit: int = 60) -> str:
    """``text``, or its beginning."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def show(value: object) -> str:
    """A value as a schedule spells it, shortened."""
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, (dict, tuple, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    return shorten(repr(value))


def scalar(text: str) -> str | int | float | bool | None:
    """What a plain (unquoted) scalar means: YAML 1.2's core schema in decimal, nothing more.

    ``no`` and ``on`` are words, ``1e-3`` is a number, ``010`` and ``1:30`` are words.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(re.sub(r"\.(?=[a-zA-Z])", "", text))
    return text


def read_text(path: Path) -> str:
    """A small file as text; more than 1 MiB comes as that many spaces, which readers refuse.

    Raises ScheduleError for what cannot be read and for what is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        return content.decode("utf-8-sig") if len(content) <= MAX_BYTES else " " * len(content)
    except OSError as error:
        raise ScheduleError(
            f"cannot read the schedule: {error.strerror or error}",
            where=str(path),
            hint="give the path of a YAML file",
        ) from None
    except UnicodeDecodeError:
        raise ScheduleError(
            "the schedule is not UTF-8 text", where=str(path), hint="save it as UTF-8"
        ) from None


def read_yaml(text: str, name: str) -> tuple[object, Source]:
    """The one document in ``text`` as dicts, tuples and scalars, and where each of them stands.

    Raises ScheduleError for what is not YAML and for anchors, aliases, tags, directives, duplicate
    or non-text keys, several documents, more than 1 MiB and more than 16 levels.
    """
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ScheduleError(
            f"the schedule is larger than {MAX_BYTES} bytes",
            where=name,
            hint="a schedule lists one number per decoder layer; is this the right file?",
        )
    builder = _Builder(name)
    for event in _events(text, name):
        builder.take(event)
    return builder.finish()


def _events(text: str, name: str) -> Iterator[Any]:
    """PyYAML's events (no recursion, no construction); its complaints become ours."""
    try:
        yield from yaml.parse(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = f"not valid YAML: {shorten(str(error.problem or error.context), 120)}"
        raise ScheduleError(problem, where=where, hint="check quotes and indentation") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        problem = f"not valid YAML: {shorten(str(error).splitlines()[0], 120)}"
        raise ScheduleError(problem, where=name, hint="save it as plain UTF-8 text") from None


@dataclass
class _Frame:
    """A collection being read."""

    key: Key
    items: dict[str, object] | list[object]
    pending: str | None = None

    def child(self) -> Key:
        return (*self.key, len(self.items) if self.pending is None else self.pending)


class _Builder:
    """Puts events together and notes their lines."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Key, int] = {}
        self.stack: list[_Frame] = []
        self.roots: list[object] = []
        self.documents = 0

    def finish(self) -> tuple[object, Source]:
        if not self.roots:
            raise ScheduleError("the schedule is empty", where=self.name, hint="begin: version: 1")
        return self.roots[0], Source(self.name, self.lines)

    def take(self, event: Any) -> None:
        self._refuse_extras(event)
        if isinstance(event, yaml.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._open(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            items = self.stack.pop().items
            self._place(items if isinstance(items, dict) else tuple(items))

    def _refuse_extras(self, event: Any) -> None:
        """The parts of YAML that a schedule has no use for."""
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if event.version or event.tags:
                raise self._error("directives are not allowed", event, "remove the line with %")
            if self.documents > 1:
                raise self._error("more than one document", event, "one file, one schedule")
        if isinstance(event, yaml.AliasEvent):
            raise self._error(f"alias *{shorten(str(event.anchor))}", event, "write the value out")
        if getattr(event, "anchor", None):
            raise self._error(f"anchor &{shorten(event.anchor)}", event, "write the value out")
        if getattr(event, "tag", None):
            raise self._error(f"tag {shorten(event.tag)}", event, "remove the tag")

    def _error(self, message: str, event: Any, hint: str) -> ScheduleError:
        return ScheduleError(message, where=f"{self.name}:{event.start_mark.line + 1}", hint=hint)

    def _scalar(self, event: Any) -> None:
        line = event.start_mark.line + 1
        if self.stack and isinstance(self.stack[-1].items, dict) and self.stack[-1].pending is None:
            self._begin_key(event)
            return
        is_integer = event.style is None and _INTEGER.fullmatch(event.value)
        if is_integer and len(event.value) > MAX_DIGITS:
            raise self._error(f"number {shorten(event.value)} is too long", event, "shorten it")
        self._note(line)
        self._place(scalar(event.value) if event.style is None else event.value)

    def _begin_key(self, event: Any) -> None:
        frame, key = self.stack[-1], event.value
        if event.style is None and not isinstance(scalar(key), str):
            raise self._error(f"key {shorten(key)!r} is not a word", event, "keys are words")
        if key in frame.items:
            first = self.lines[(*frame.key, key)]
            message = f"key {shorten(key)!r} is here twice, first in line {first}"
            raise self._error(message, event, "remove one of the two")
        frame.pending = key
        self.lines[frame.child()] = event.start_mark.line + 1

    def _open(self, event: Any) -> None:
        if len(self.stack) >= MAX_DEPTH:
            raise self._error("too deeply nested", event, f"at most {MAX_DEPTH} levels")
        if self.stack and isinstance(self.stack[-1].items, dict) and self.stack[-1].pending is None:
            raise self._error("a key is not a word", event, "keys are words")
        self._note(event.start_mark.line + 1)
        key = self.stack[-1].child() if self.stack else ()
        items: dict[str, object] | list[object] = (
            {} if isinstance(event, yaml.MappingStartEvent) else []
        )
        self.stack.append(_Frame(key, items))

    def _note(self, line: int) -> None:
        self.lines.setdefault(self.stack[-1].child() if self.stack else (), line)

    def _place(self, value: object) -> None:
        """Hand a finished value to its collection."""
        if not self.stack:
            self.roots.append(value)
            return
        frame = self.stack[-1]
        if isinstance(frame.items, list):
            frame.items.append(value)
        elif frame.pending is not None:
            frame.items[frame.pending] = value
            frame.pending = None
