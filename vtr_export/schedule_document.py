"""The schedule language, version 1: what a document may say, before any model is known."""

import difflib
import itertools
import json
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    Strict,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from vtr_export.errors import ScheduleError
from vtr_export.schedule_yaml import Key, Source, show

MAX_PART: Final = 1_000_000  # of a fraction: tokens x numerator stays far inside int64
_PERCENT: Final = re.compile(r"([0-9]{1,9})(\.[0-9]{1,9})?%")
_RATIO: Final = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")
_FORMS: Final = "write an integer (144), a percentage (25%) or a fraction (1/4)"


def _refuse(message: str, hint: str) -> PydanticCustomError:
    return PydanticCustomError("vtr", "{message}", {"message": message, "hint": hint})


def _read_version(value: object) -> object:
    if type(value) is not int or value != 1:
        raise _refuse(f"version is {show(value)}", "this release reads version: 1")
    return value


def read_keep(value: object) -> int | Fraction:
    """Tokens per image, or an exact share of them; floats are refused, they are not exact."""
    if isinstance(value, float):
        exact = f"{value * 100:g}%" if 0 <= value <= 1 else "50%"
        raise _refuse(f"keep is {show(value)}, a float, which is not exact", f"write {exact}")
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value <= MAX_PART:
            raise _refuse(f"keep is {value}", f"write 0 (drop all) to {MAX_PART}")
        return value
    share = read_share(value) if isinstance(value, str) else value
    if not isinstance(share, Fraction):
        raise _refuse(f"keep is {show(value)}, not a number of tokens", _FORMS)
    if not 0 <= share <= 1:
        raise _refuse(f"keep is {show(value)}, outside 0 to 100%", "a cut can only drop tokens")
    if share.denominator > MAX_PART:
        raise _refuse(f"keep is {show(value)}, too fine", f"use a denominator up to {MAX_PART}")
    return share


def read_share(text: str) -> Fraction | None:
    """``12.5%`` or ``1/8`` exactly; None for anything else."""
    if match := _PERCENT.fullmatch(text):
        return Fraction(match[1] + (match[2] or "")) / 100
    match = _RATIO.fullmatch(text)
    return Fraction(int(match[1]), int(match[2])) if match and int(match[2]) else None


def write_keep(keep: int | Fraction) -> int | str:
    """The spelling that ``read_keep`` reads back."""
    if isinstance(keep, int):
        return keep
    if MAX_PART % keep.denominator:
        return f"{keep.numerator}/{keep.denominator}"
    digits = keep.numerator * (MAX_PART // keep.denominator)  # millionths
    whole, rest = divmod(digits, 10_000)
    return f"{whole}" + (f".{rest:04}".rstrip("0") if rest else "") + "%"


_KEEP_SCHEMA: Final = {
    "description": "Vision tokens per image, or an exact share of them: 144, 25%, 1/4.",
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": MAX_PART},
        {"type": "string", "pattern": r"^[0-9]{1,9}((\.[0-9]{1,9})?%|/[0-9]{1,9})$"},
    ],
}
KeepValue = Annotated[
    int | Fraction,
    PlainValidator(read_keep),
    PlainSerializer(write_keep),
    WithJsonSchema(_KEEP_SCHEMA),
]
Origin = str | int | float | bool | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Score(_Strict):
    """The number that ranks vision tokens at a cut."""

    source: Literal["previous", "next"] = Field(
        default="previous",
        alias="from",
        description="Attention of the layer before the cut, or the next layer's own projections.",
    )
    query: Literal["last", "text"] = Field(
        default="last", description="The last prompt token, or all text after the last image."
    )
    heads: Literal["mean", "max"] = Field(default="mean", description="How heads are combined.")


class Stage(_Strict):
    """From ``before_layer`` on, ``keep`` vision tokens are left."""

    before_layer: int = Field(ge=0, description="The first layer that sees only the kept tokens.")
    keep: KeepValue


class Prefill(_Strict):
    """Which vision tokens survive at which decoder layer: ``stages`` or ``keep``, not both."""

    score: Score = Score()
    rank: Literal["joint", "per_image"] = Field(
        default="joint", description="All images compete for one budget, or each has its own."
    )
    positions: Literal["original", "repacked"] = Field(
        default="original", description="Survivors keep their positions, or are numbered anew."
    )
    drop_point: Literal["between", "inside"] = Field(
        default="between",
        description="Between two layers, or inside the first of them, before its o_proj.",
    )
    rounding: Literal["floor", "ceil"] = Field(
        default="floor", description="How a share of the tokens becomes an integer."
    )
    stages: Annotated[tuple[Stage, ...], Strict(False)] | None = Field(
        default=None, description="Only where it changes."
    )
    keep: Annotated[tuple[KeepValue, ...], Strict(False)] | None = Field(
        default=None, description="Vision tokens entering each decoder layer, one per layer."
    )


class Document(_Strict):
    """How many vision tokens survive at each decoder layer."""

    version: Annotated[Literal[1], BeforeValidator(_read_version)] = Field(
        description="Of this language."
    )
    model: str | None = Field(
        default=None, description="Checkpoint folder, relative to this file, or hub id."
    )
    vision: tuple[Any, ...] = Field(
        default=(), max_length=0, description="Reductions before the decoder: none in this version."
    )
    prefill: Prefill
    decode: tuple[Any, ...] = Field(
        default=(), max_length=0, description="Reductions of the cache: none in this version."
    )
    origin: dict[str, Origin] = Field(
        default_factory=dict, description="Provenance; says nothing about what is computed."
    )


_MODELS: Final[Mapping[Key, type[_Strict]]] = {
    (): Document,
    ("prefill",): Prefill,
    ("prefill", "score"): Score,
    ("prefill", "stages"): Stage,
}
_EXAMPLES: Final = {
    "version": "version: 1",
    "prefill": "prefill: {stages: [{before_layer: 2, keep: 50%}]}",
    "before_layer": "{before_layer: 2, keep: 50%}",
    "keep": "{before_layer: 2, keep: 50%}",
}
_KINDS: Final = {
    "int_type": "an integer",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "finite_number": "a finite number",
}


def validate(data: object, source: Source) -> Document:
    """The document that ``data`` spells, or a ScheduleError for its first mistake."""
    try:
        return Document.model_validate(data)
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise _translate(first, source) from None


def _translate(error: ErrorDetails, source: Source) -> ScheduleError:
    """Pydantic's complaint with our place and a way out."""
    key: Key = tuple(k for k in error["loc"])
    key = key[:2] if key[:1] == ("origin",) else key  # drops the union's member names
    message, hint = _say(error, key)
    return ScheduleError(message, where=source.at(key), hint=hint)


def _say(error: ErrorDetails, key: Key) -> tuple[str, str]:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    name = key[-1] if key else "the schedule"
    if kind == "vtr":
        return context["message"], context["hint"]
    if kind == "extra_forbidden":
        return f"unknown key {show(name)}", _did_you_mean(str(name), _keys(key[:-1]))
    if kind == "missing":
        return f"key {name!r} is missing", _EXAMPLES.get(str(name), f"add {name}:")
    if kind == "literal_error":
        allowed = _allowed(key)
        return f"{name} is {show(value)}", _did_you_mean(str(value), allowed)
    if kind == "too_long":
        return f"{name} lists a reduction, but this version has none", f"write {name}: []"
    if kind == "greater_than_equal":
        return f"{name} is {show(value)}", "the first layer is 0"
    wanted = (
        "a plain value" if key[:1] == ("origin",) else _KINDS.get(kind, "what is expected here")
    )
    example = "samples/schedules shows every field"
    return f"{name} is {show(value)}, not {wanted}", example


def _model_at(key: Key) -> type[_Strict]:
    return _MODELS[tuple(k for k in key if not isinstance(k, int))]


def _keys(key: Key) -> list[str]:
    return [field.alias or name for name, field in _model_at(key).model_fields.items()]


def _allowed(key: Key) -> list[str]:
    for name, field in _model_at(key[:-1]).model_fields.items():
        if key[-1] in (name, field.alias):
            return [str(value) for value in field.annotation.__args__]  # type: ignore[union-attr]  # a Literal
    return []


def _did_you_mean(word: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(word[:100], allowed, n=1)
    return f"did you mean {near[0]}?" if near else f"one of: {', '.join(allowed)}"


def check(document: Document, source: Source) -> None:
    """What must hold between fields, for any model."""
    prefill = document.prefill
    if (prefill.keep is None) == (prefill.stages is None):
        raise ScheduleError(
            "prefill needs either stages or keep, and not both",
            where=source.at(("prefill",)),
            hint=_EXAMPLES["prefill"],
        )
    if prefill.drop_point == "inside" and prefill.score.source == "next":
        raise ScheduleError(
            "drop_point inside cuts before the next layer has seen the tokens",
            where=source.at(("prefill", "drop_point")),
            hint="score from previous, or drop_point between",
        )
    _check_stages(prefill, source)
    _check_growth(prefill, source)


def _check_stages(prefill: Prefill, source: Source) -> None:
    before = -1
    for i, stage in enumerate(prefill.stages or ()):
        where = source.at(("prefill", "stages", i, "before_layer"))
        if stage.before_layer <= before:
            raise ScheduleError(
                f"before_layer {stage.before_layer} comes after {before}",
                where=where,
                hint="list stages from the first layer to the last, each layer once",
            )
        before = stage.before_layer
        if before == 0 and prefill.score.source == "previous":
            raise first_layer_error(where)


def first_layer_error(where: str) -> ScheduleError:
    """A cut before layer 0 scored by a layer that does not exist."""
    return ScheduleError(
        "a cut before layer 0 has no previous layer to score it",
        where=where,
        hint="score: {from: next}, or cut before layer 1",
    )


def _check_growth(prefill: Prefill, source: Source) -> None:
    """Neighbours of one kind; the rest is compared when the model is known."""
    keeps = keep_values(prefill)
    for (_, before), (key, after) in itertools.pairwise(keeps):
        if isinstance(before, int) == isinstance(after, int) and after > before:
            raise growth_error(before, after, source.at(key))


def growth_error(before: int | Fraction, after: int | Fraction, where: str) -> ScheduleError:
    """More tokens after a cut than before it."""
    was, now = write_keep(before), write_keep(after)
    return ScheduleError(
        f"keep grows from {was} to {now}, but dropped tokens do not come back",
        where=where,
        hint=f"keep at most {was} here, or more before",
    )


def keep_values(prefill: Prefill) -> list[tuple[Key, int | Fraction]]:
    """Every keep in order, with its key."""
    if prefill.keep is not None:
        return [(("prefill", "keep", i), keep) for i, keep in enumerate(prefill.keep)]
    stages = prefill.stages or ()
    return [(("prefill", "stages", i, "keep"), stage.keep) for i, stage in enumerate(stages)]


def plain(document: Document) -> dict[str, Any]:
    """The document as dicts, lists and scalars, every default written out."""
    data = document.model_dump(by_alias=True, mode="json")
    if data["model"] is None:
        del data["model"]
    prefill = data["prefill"]
    del prefill["keep" if prefill["keep"] is None else "stages"]
    return data


def json_schema() -> str:
    """The JSON Schema that editors read, as text."""
    schema = Document.model_json_schema(by_alias=True)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vtr-export schedule",
    }
    return json.dumps(head | schema | {"title": head["title"]}, indent=2) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("schedule.schema.json").write_text(json_schema(), encoding="utf-8")
