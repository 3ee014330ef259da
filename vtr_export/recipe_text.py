"""The text of a recipe: JSON, YAML, a command line, or lines ``name = value``."""

import difflib
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from vtr_export.errors import ScheduleError
from vtr_export.schedule_yaml import Source, read_yaml, shorten, show

LIST: Final = "list"  # the name of a list that stands alone
_ASSIGNMENT: Final = re.compile(r"([A-Za-z_]\w*)\s*=\s*(\[[^#]*\]|[^\s#]+)\s*(?:#.*)?")
_VARIABLE: Final = re.compile(r"([A-Za-z_]\w*)=(.+)")


@dataclass(frozen=True)
class Options:
    """What a recipe says, by name. ``tokens`` (of an image) is what the caller knows.

    A program's text holds much else, so only a mapping ``is_strict``: it has no unknown name.
    """

    values: Mapping[str, Any]
    source: Source
    is_strict: bool
    tokens: int | None = None

    def has(self, names: Collection[str]) -> bool:
        """Whether any of ``names`` is there."""
        return not self.values.keys().isdisjoint(names)

    def with_tokens(self, tokens: int | None) -> "Options":
        """The same, of images with so many tokens."""
        return replace(self, tokens=tokens)

    def only(self, names: Sequence[str]) -> None:
        """Refuse any other name."""
        for name in self.values if self.is_strict else ():
            if name not in names:
                near = difflib.get_close_matches(name[:100], names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
                raise self.error(name, f"unknown name {show(name)}", hint)

    def find(self, *names: str) -> tuple[str, Any]:
        """The first of ``names`` that is there, and its value."""
        for name in names:
            if name in self.values:
                return name, self.values[name]
        raise self.error(names[0], f"{names[0]} is missing", f"add {names[0]}")

    def count(self, *names: str) -> int:
        """A whole number."""
        name, value = self.find(*names)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"{name} is {show(value)}", "give an integer")
        return value

    def count_or_none(self, *names: str) -> int | None:
        """A whole number, if any of ``names`` is there."""
        return self.count(*names) if self.has(names) else None

    def ratio(self, *names: str) -> float | str:
        """A share of the tokens; what it may be, the generators say."""
        name, value = self.find(*names)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise self.error(name, f"{name} is {show(value)}", "give a share, 0.5")
        return value

    def items(self, *names: str) -> tuple[Any, ...]:
        """A list."""
        name, value = self.find(*names)
        if not isinstance(value, tuple):
            raise self.error(name, f"{name} is {show(value)}", "give a list, [8,16,24]")
        return value

    def error(self, name: str, message: str, hint: str) -> ScheduleError:
        """What is wrong with ``name``."""
        return ScheduleError(message, where=self.source.at((name,)), hint=hint)


def read_options(text: str, where: str, names: Collection[str]) -> Options:
    """What ``text`` says; of a program's text only ``names`` are read.

    Raises ScheduleError for what is neither.
    """
    try:
        data, source = read_yaml(text, where)
    except ScheduleError:
        values = dict(_program(text, where, names))
        if not values:
            raise
        return Options(values, Source(where), is_strict=False)
    if isinstance(data, dict):
        return Options(data, source, is_strict=True)
    if isinstance(data, tuple):
        return Options({LIST: data}, source, is_strict=True)
    return Options(dict(_program(text, where, names)), Source(where), is_strict=False)


def _program(text: str, where: str, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Options, variables and assignments of a script, as far as ``names`` has them."""
    for line in text.replace("\\\n", " ").splitlines():
        assigned = _ASSIGNMENT.fullmatch(line.strip())
        for name, value in [assigned.group(1, 2)] if assigned else _words(line):
            name = name.replace("-", "_")
            if name in names:
                yield name, read_yaml(value, f"{where}: {shorten(name)}")[0]


def _words(line: str) -> Iterator[tuple[str, str]]:
    """``--name value``, ``--name=value``, ``--flag`` and ``NAME=value``; nothing if none parses."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quotation that does not end on its line
        return
    for word, following in zip(words, [*words[1:], "--"], strict=False):  # there may be no word
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            is_flag = not equals and following.startswith("--")
            yield name, "true" if is_flag else value if equals else following
        elif match := _VARIABLE.fullmatch(word):
            yield match[1], match[2]
