"""Chat templates, rendered in the sandbox transformers renders them in."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vtr_export.errors import ArtifactError, InputError
from vtr_export.runtime.json_files import read_json

Message: TypeAlias = Mapping[str, Any]  # role, content
_REFUSALS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
    RecursionError,
)  # fmt: skip
TEMPLATE, LEGACY_TEMPLATE = "chat_template.jinja", "chat_template.json"


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the file it came from.

    ``lists`` says whether it takes a message's content as a list of parts; those that come with a
    tokenizer take a string.
    """

    text: str
    where: str
    lists: bool = True

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate | None":
        """Where transformers looks first comes first; None when there is none."""
        for name in ("processor_config.json", LEGACY_TEMPLATE):
            if text := _default(read_json(folder / name).get("chat_template")):
                return cls(text, str(folder / name))
        if (file := folder / TEMPLATE).is_file():
            return cls(file.read_text(encoding="utf-8"), str(file))
        file = folder / "tokenizer_config.json"
        if text := _default(read_json(file).get("chat_template")):
            return cls(text, str(file), lists=False)
        return None

    def render(
        self, messages: Sequence[Message], special: Mapping[str, str], *, ask: bool = True
    ) -> str:
        """The prompt; ``ask`` ends it where the assistant begins. ``special``: tokens by name.

        InputError when the template refuses the messages, ArtifactError when it is no template.
        """
        try:
            template = _environment().from_string(self.text)
        except jinja2.TemplateError as error:
            raise ArtifactError(
                f"the chat template is broken: {error}",
                where=self.where,
                hint="take the file from the checkpoint again",
            ) from error
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=ask,
                **special,
            )
        except _REFUSALS as error:
            raise InputError(
                f"the chat template refuses: {error}",
                where=self.where,
                hint="write the prompt out yourself, with the image's place in it",
            ) from error


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says; it prints its body."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2's own form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dict:
    """``dict`` without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that stores no underscore names: they lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace does not store {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:  # noqa: A002 -- templates may name it
    return datetime.now().strftime(format)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _default(value: object) -> str | None:
    """The template of a file that holds one, or several by name."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, Mapping):
        value = value.get("default")
    return value if isinstance(value, str) and value else None
