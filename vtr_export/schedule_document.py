"""The schedule language, version 1: what a document may say, before any model is known."""

import difflib
import itertools
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Strict, ValidationError
from pydantic_core import ErrorDetails

from vtr_export.errors import ScheduleError
from vtr_export.keeps import KeepValue, StrictModel, refuse, write_keep
from vtr_export.reductions.registry import CACHE, VISION, Decode, Vision
from vtr_export.schedule_yaml import Key, Source, show


def _read_version(value: object) -> object:
    if type(value) is not int or value != 1:
        raise refuse(f"version is {show(value)}", "this release reads version: 1")
    return value


Origin = str | int | float | bool | None


class Score(StrictModel):
    """The number that ranks vision tokens at a cut."""

    source: Literal["previous", "next"] = Field(
        default="previous",
        alias="from",
        description="Attention of the layer before the cut, or the next layer's own projections.",
    )
    rule: Literal["attention", "self_cross", "redundancy"] = Field(
        default="attention",
        description="What query rows give a token; FitPrune's product; FiCoCo-L's difference.",
    )
    query: Literal["last", "text", "raters"] = Field(
        default="last",
        description="The last prompt token, all text after the last image, or SparseVLM's raters.",
    )
    heads: Literal["mean", "max"] = Field(default="mean", description="How heads are combined.")


class Stage(StrictModel):
    """From ``before_layer`` on, ``keep`` vision tokens are left."""

    before_layer: int = Field(ge=0, description="The first layer that sees only the kept tokens.")
    keep: KeepValue


class Threshold(StrictModel):
    """MustDrop: a token goes whose share of attention is below both; keeps are upper bounds."""

    whole: float = Field(ge=0, le=1, description="Of all that vision tokens get, over all rows.")
    single: float = Field(ge=0, le=1, description="Of any one row's attention.")


class Drop(StrictModel):
    """Nothing is made of dropped tokens."""

    by: Literal["drop"] = "drop"


class Recycle(StrictModel):
    """SparseVLM: the best of the dropped tokens become the means of clusters behind the kept."""

    by: Literal["recycle"] = "recycle"
    share: KeepValue = Field(default=Fraction(3, 10), description="Of the dropped tokens.")
    each: int = Field(default=10, ge=1, description="Tokens of a cluster, about.")

    def of(self, dropped: int) -> tuple[int, int]:
        """Of ``dropped`` tokens: how many are recycled, into how many clusters (its code's rule).

        One at least of each, where there is any.
        """
        recycled = min(dropped, int(dropped * Fraction(self.share)) + 1)
        return recycled, min(recycled, recycled // self.each + 1)


class Correlate(StrictModel):
    """FiCoCo: each dropped token is added to the kept ones that it correlates with."""

    by: Literal["correlate"] = "correlate"
    direct: float = Field(default=0.6, ge=0, le=1, description="Weight beside the way over text.")
    nearest: int = Field(default=2, ge=1, description="Kept tokens that each is added to.")


class Prefill(StrictModel):
    """Which vision tokens survive at which decoder layer: ``stages`` or ``keep``, not both."""

    score: Score = Score()
    rank: Literal["joint", "per_image"] = Field(
        default="joint", description="All images compete for one budget, or each has its own."
    )
    positions: Literal["original", "repacked"] = Field(
        default="original", description="Survivors keep their positions, or are numbered anew."
    )
    drop_point: Literal["between", "inside", "attended"] = Field(
        default="between",
        description="Between two layers, or in the first: before its o_proj, or before its MLP.",
    )
    threshold: Threshold | None = Field(default=None, description="Drops more than keep says.")
    protect: Literal["none", "keys"] = Field(
        default="none", description="Tokens that a vision reduction protects are never dropped."
    )
    merge: Annotated[Drop | Recycle | Correlate, Discriminator("by")] = Field(
        default=Drop(), description="What becomes of dropped tokens."
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


class Document(StrictModel):
    """How many vision tokens survive at each decoder layer."""

    version: Annotated[Literal[1], BeforeValidator(_read_version)] = Field(
        description="Of this language."
    )
    model: str | None = Field(
        default=None, description="Checkpoint folder, relative to this file, or hub id."
    )
    vision: Annotated[tuple[Vision, ...], Strict(False)] = Field(
        default=(), description="Reductions before the decoder, in order."
    )
    prefill: Prefill = Prefill(stages=())
    decode: Annotated[tuple[Decode, ...], Strict(False)] = Field(
        default=(), max_length=1, description="A reduction of the cache behind the prefill."
    )
    origin: dict[str, Origin] = Field(
        default_factory=dict, description="Provenance; says nothing about what is computed."
    )


_MODELS: Final[Mapping[Key, type[StrictModel]]] = {
    (): Document,
    ("prefill",): Prefill,
    ("prefill", "score"): Score,
    ("prefill", "stages"): Stage,
    ("prefill", "threshold"): Threshold,
}
_METHODS: Final[Mapping[str, Mapping[str, type[StrictModel]]]] = {
    "vision": VISION,
    "decode": CACHE,
    "merge": {"drop": Drop, "recycle": Recycle, "correlate": Correlate},
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

_LAYERS: Final = ("before_layer",)
_BOUNDS: Final = {
    "greater_than_equal": "it is {ge} at least",
    "greater_than": "it is more than {gt}",
    "less_than_equal": "it is {le} at most",
    "less_than": "it is less than {lt}",
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
    kind, key = _told(key)
    message, hint = _say(error, key, kind)
    return ScheduleError(message, where=source.at(key), hint=hint)


def _told(key: Key) -> tuple[type[StrictModel] | None, Key]:
    """Of an entry whose kind a word tells: that kind, and the key without the word."""
    for at, name in enumerate(key):
        kinds = _METHODS.get(str(name))
        word = at + 1 + (name in ("vision", "decode"))
        if kinds is not None and len(key) > word:
            return kinds[str(key[word])], (*key[:word], *key[word + 1 :])
    return None, key


def _say(error: ErrorDetails, key: Key, told: type[StrictModel] | None) -> tuple[str, str]:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    name = key[-1] if key else "the schedule"
    if kind == "vtr":
        return context["message"], context["hint"]
    if kind == "extra_forbidden":
        keys = _keys(told or _model_at(key[:-1]))
        return f"unknown key {show(name)}", _did_you_mean(str(name), keys)
    if kind == "missing":
        return f"key {name!r} is missing", _EXAMPLES.get(str(name), f"add {name}:")
    if kind == "literal_error":
        allowed = _allowed(told or _model_at(key[:-1]), key[-1])
        return f"{name} is {show(value)}", _did_you_mean(str(value), allowed)
    return _no_such(key, value) if kind.startswith("union_tag") else _out_of_bounds(error, key)


def _out_of_bounds(error: ErrorDetails, key: Key) -> tuple[str, str]:
    """A value of another kind, too large, too small, or too much of it."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    name = key[-1] if key else "the schedule"
    if kind == "too_long":
        return f"{name} lists several reductions of the cache", "leave one"
    if kind in _BOUNDS:
        bound = (
            "the first layer is 0" if name == "before_layer" else _BOUNDS[kind].format(**context)
        )
        return f"{name} is {show(value)}", bound
    wanted = (
        "a plain value" if key[:1] == ("origin",) else _KINDS.get(kind, "what is expected here")
    )
    example = "samples/schedules shows every field"
    return f"{name} is {show(value)}, not {wanted}", example


def _no_such(key: Key, value: object) -> tuple[str, str]:
    """An entry whose word names no kind of it."""
    part = str(next(name for name in reversed(key) if isinstance(name, str)))
    known, field = list(_METHODS[part]), "by" if part == "merge" else "method"
    said = value.get(field) if isinstance(value, dict) else None
    if said is None:
        return f"{part} has an entry without {field}", f"write {{{field}: {known[0]}, ...}}"
    return f"{field} is {show(said)}", _did_you_mean(str(said), known)


def _model_at(key: Key) -> type[StrictModel]:
    return _MODELS[tuple(k for k in key if not isinstance(k, int))]


def _keys(kind: type[StrictModel]) -> list[str]:
    return [field.alias or name for name, field in kind.model_fields.items()]


def _allowed(kind: type[StrictModel], key: str | int) -> list[str]:
    for name, field in kind.model_fields.items():
        if key in (name, field.alias):
            return [str(value) for value in field.annotation.__args__]  # type: ignore[union-attr]  # a Literal
    return []


def _did_you_mean(word: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(word[:100], allowed, n=1)
    return f"did you mean {near[0]}?" if near else f"one of: {', '.join(allowed)}"


def check(document: Document, source: Source) -> None:
    """What must hold between fields, for any model."""
    prefill = document.prefill
    if not (document.model_fields_set & {"prefill", "vision", "decode"}):
        raise ScheduleError(
            "key 'prefill' is missing", where=source.at(("prefill",)), hint=_EXAMPLES["prefill"]
        )
    if (prefill.keep is None) == (prefill.stages is None):
        raise ScheduleError(
            "prefill needs either stages or keep, and not both",
            where=source.at(("prefill",)),
            hint=_EXAMPLES["prefill"],
        )
    if prefill.drop_point != "between" and prefill.score.source == "next":
        raise ScheduleError(
            f"drop_point {prefill.drop_point} cuts before the next layer has seen the tokens",
            where=source.at(("prefill", "drop_point")),
            hint="score from previous, or drop_point between",
        )
    if document.decode and isinstance(prefill.merge, Recycle):
        raise ScheduleError(
            "decode narrows the caches of earlier layers, which hold no recycled token",
            where=source.at(("decode",)),
            hint="merge: {by: drop}, or leave decode out",
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
    if prefill["threshold"] is None:
        del prefill["threshold"]
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
