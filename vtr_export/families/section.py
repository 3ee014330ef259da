"""One object of a ``config.json`` over its defaults, and where to point when it is wrong."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from vtr_export.errors import CheckpointError

Config = Mapping[str, Any]
FRESH: Final = "check it against a fresh download of the model"


def defaults() -> Mapping[str, Config]:
    """What transformers' configuration classes say where a file is silent: by ``model_type``."""
    types: Mapping[str, Config] = _stored()["types"]
    return types


def architectures() -> Mapping[str, str]:
    """Class by ``model_type``: all that transformers has for images and text."""
    classes: Mapping[str, str] = _stored()["architectures"]
    return classes


@cache
def _stored() -> Mapping[str, Any]:
    text = (Path(__file__).parent / "defaults.json").read_text(encoding="utf-8")
    found: Mapping[str, Any] = json.loads(text)
    return found


@dataclass(frozen=True)
class Section:
    """One object of the configuration, its defaults, and where to point when it is wrong."""

    values: Config
    name: str
    where: str

    def size(self, key: str) -> int:
        """A positive integer."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{self.name}{key} is {value!r}, not a positive integer",
                where=self.where,
                hint=FRESH,
            )
        return value

    def side(self, key: str) -> int:
        """A positive integer, or two equal ones (height, width)."""
        value = self.values.get(key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            return Section({key: value[0]}, self.name, self.where).size(key)
        return self.size(key)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{self.name}{key} is {value!r}, not true or false", where=self.where, hint=FRESH
            )
        return value

    def number(self, key: str) -> int | None:
        """A positive integer, or nothing."""
        return None if self.values.get(key) is None else self.size(key)

    def positive(self, key: str) -> float | None:
        """A number above zero, or nothing."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(f"{key} is {value!r}, not a number above zero")
        return float(value)

    def error(self, message: str, hint: str = FRESH) -> CheckpointError:
        """What is wrong with this section."""
        return CheckpointError(f"{self.name}{message}", where=self.where, hint=hint)


def section_of(config: Config, key: str, fallback: str, where: str) -> tuple[str, Section]:
    """The sub-configuration ``key`` over its defaults, and its model type."""
    given = config.get(key)
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise CheckpointError(
            f"{key} is {type(given).__name__}, not an object", where=where, hint=FRESH
        )
    kind = given.get("model_type") or fallback
    if not isinstance(kind, str) or kind not in defaults():
        raise CheckpointError(
            f"{key}.model_type {kind!r} is not supported",
            where=where,
            hint="export a checkpoint whose parts transformers knows",
        )
    return kind, Section({**defaults()[kind], **given}, f"{key}.", where)


def filled(config: Config) -> Config:
    """A whole configuration over what its class says where the file is silent."""
    own = defaults()[config["model_type"]]
    given = {name: value for name, value in config.items() if value is not None}
    for alias, name in own.get("aliases", {}).items():
        if alias in given:
            given.setdefault(name, given[alias])
    notes = ("absent", "derived", "aliases", "sub_configs", "tie_word_embeddings")  # see is_tied
    plain = {name: value for name, value in own.items() if name not in notes}
    return {**plain, **own.get("derived", {}), **own.get("absent", {}), **given}


def is_tied(config: Config, text: Section) -> bool:
    """Whether the head is the embedding: the whole model's flag says so, or the decoder's.

    The decoder's where transformers' class hands it up, or has no flag of its own; and a decoder
    that is said to have a head of its own has it where the file says no more, as older
    transformers wrote it.
    """
    own, given = defaults().get(config["model_type"], {}), config.get("text_config")
    apart = isinstance(given, Mapping) and given.get("tie_word_embeddings") is False
    silent = bool(own.get("tie_word_embeddings")) and not apart
    stated = {name: value for name, value in config.items() if value is not None}
    whole = Section(stated, "", text.where).flag("tie_word_embeddings", silent)
    handed = own.get("tied_by_text", False) or own.get("tie_word_embeddings") is None
    return whole or (handed and text.flag("tie_word_embeddings", False))


def image_token(config: Config, default: int, where: str) -> int:
    """The id of an image's places in a prompt."""
    value = config.get("image_token_index", config.get("image_token_id", default))
    if type(value) is not int or value < 0:
        message = f"image_token_index is {value!r}, not a token id"
        raise CheckpointError(message, where=where, hint=FRESH)
    return value
