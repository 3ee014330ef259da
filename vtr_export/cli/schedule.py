"""``vtr schedule``: make, show, convert and compare schedules."""

import difflib
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtr_export.cli.output import PLAIN, Json, report, runs
from vtr_export.cli.plan import facts_of
from vtr_export.errors import InputError

if TYPE_CHECKING:
    from vtr_export.schedule import Resolved, Schedule

app = typer.Typer(name="schedule", help="Make, show, convert and compare schedules.", **PLAIN)


@app.callback(no_args_is_help=True)
def _root() -> None: ...


class Source(StrEnum):
    """Whose attention scores the tokens."""

    PREVIOUS = "previous"
    NEXT = "next"


class Query(StrEnum):
    """Whose attention counts."""

    LAST = "last"
    TEXT = "text"


class Heads(StrEnum):
    """How heads are combined."""

    MEAN = "mean"
    MAX = "max"


class Rank(StrEnum):
    """Among whom tokens compete."""

    JOINT = "joint"
    PER_IMAGE = "per_image"


class Positions(StrEnum):
    """What positions survivors have."""

    ORIGINAL = "original"
    REPACKED = "repacked"


class DropPoint(StrEnum):
    """Where tokens are dropped."""

    BETWEEN = "between"
    INSIDE = "inside"


class Rounding(StrEnum):
    """How a share becomes an integer."""

    FLOOR = "floor"
    CEIL = "ceil"


class Form(StrEnum):
    """How the keeps are spelled."""

    KEEP = "keep"
    STAGES = "stages"


Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write it there, not to stdout.")]
Tokens = Annotated[
    int | None,
    typer.Option(help="Vision tokens of an image: write integers, rounded as published."),
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder with a config.json, or cached hub id.")
]
File = Annotated[Path, typer.Argument(help="Schedule (YAML).")]


@app.command()
def fastv(
    k: Annotated[int, typer.Option(help="The first layer that sees fewer tokens.")] = 2,
    r: Annotated[str, typer.Option(help="Share to drop: 0.5, 50% or 1/2.")] = "0.5",
    tokens: Tokens = None,
    out: Out = None,
) -> None:
    """FastV: drop a share once, early."""
    from vtr_export.schedule import Schedule

    _write(Schedule.fastv(k, r, tokens=tokens), out)


@app.command()
def pyramid(
    ratio: Annotated[str, typer.Option(help="Share each part keeps of the one before.")] = "0.5",
    layers: Annotated[int, typer.Option(help="Decoder layers of the model.")] = 32,
    parts: Annotated[int, typer.Option(help="Equal runs of layers.")] = 4,
    tokens: Tokens = None,
    out: Out = None,
) -> None:
    """PyramidDrop: keep a share of what is left, part by part."""
    from vtr_export.schedule import Schedule

    _write(Schedule.pyramid(ratio, layers=layers, parts=parts, tokens=tokens), out)


@app.command()
def vtw(
    k: Annotated[int, typer.Option(help="The first layer without vision tokens.")] = 16,
    out: Out = None,
) -> None:
    """VTW: withdraw all vision tokens at one layer."""
    from vtr_export.schedule import Schedule

    _write(Schedule.vtw(k), out)


@app.command()
def keeps(
    values: Annotated[
        list[str],
        typer.Argument(help="Tokens (or shares) entering each layer, in order: 144 144 25%."),
    ],
    score_from: Annotated[
        Source, typer.Option("--from", help="The layer that scores: previous or next to run.")
    ] = Source.PREVIOUS,
    query: Annotated[Query, typer.Option(help="The last row scores, or all text.")] = Query.LAST,
    heads: Annotated[Heads, typer.Option(help="How heads are combined.")] = Heads.MEAN,
    rank: Annotated[
        Rank, typer.Option(help="One budget for all images, or each its own.")
    ] = Rank.JOINT,
    positions: Annotated[
        Positions, typer.Option(help="Survivors keep their positions, or are numbered anew.")
    ] = Positions.ORIGINAL,
    drop_point: Annotated[
        DropPoint, typer.Option(help="Between two layers, or inside the first.")
    ] = DropPoint.BETWEEN,
    rounding: Annotated[Rounding, typer.Option(help="Of shares.")] = Rounding.FLOOR,
    out: Out = None,
) -> None:
    """An explicit list: one keep per decoder layer."""
    from vtr_export.schedule import Schedule

    words = [word for value in values for word in value.replace(",", " ").split()]
    numbers = [int(word) if word.isdecimal() else word for word in words]
    options: dict[str, Any] = {
        "score": {"from": score_from.value, "query": query.value, "heads": heads.value},
        "rank": rank.value,
        "positions": positions.value,
        "drop_point": drop_point.value,
        "rounding": rounding.value,
    }
    _write(Schedule.from_keeps(numbers, **options), out)


@app.command()
def show(schedule: File, model: Model = None, as_json: Json = False) -> None:
    """Every field with its default; with a model, what it resolves to."""
    from vtr_export.schedule import Schedule
    from vtr_export.schedule_document import plain

    parsed = Schedule.load(schedule)
    values: dict[str, Any] = {"schedule": plain(parsed.document)}
    lines = parsed.dump().splitlines()
    if model is not None or parsed.model is not None:
        resolved = parsed.resolve(facts_of(parsed, model))
        values |= {"layers": resolved.layers, "vision_tokens_per_layer": _tokens(resolved)}
        values["cuts"] = [
            {"before_layer": cut.before_layer, "keep": [cut.keep.numerator, cut.keep.denominator]}
            for cut in resolved.cuts
        ]
        lines += ["", *_resolved_lines(resolved)]
    report(values, lines, as_json)


@app.command()
def convert(
    schedule: File,
    to: Annotated[Form, typer.Option(help="One keep per layer, or only where it changes.")],
    model: Model = None,
    out: Out = None,
) -> None:
    """The same schedule, spelled for one model in the other form."""
    from vtr_export.schedule import Schedule

    parsed = Schedule.load(schedule)
    resolved = parsed.resolve(facts_of(parsed, model))
    n = resolved.tokens_per_image
    if n is None:
        raise InputError(
            "the tokens of an image vary with this model: its keeps are shares, not integers",
            where=str(schedule),
            hint="only models with a fixed number of tokens per image can be converted for",
        )
    stages = [{"before_layer": cut.before_layer, "keep": cut.keep.of(n)} for cut in resolved.cuts]
    forms = {Form.KEEP: resolved.keep_per_layer(n), Form.STAGES: tuple(stages)}
    data = _respelled(parsed, to.value, forms[to])
    if out is not None and parsed.model is not None:
        data["model"] = _seen_from(out, parsed)
    _write(Schedule.from_data(data), out)


@app.command()
def diff(first: File, second: File, as_json: Json = False) -> None:
    """What differs, defaults written out."""
    from vtr_export.schedule import Schedule

    before, after = (Schedule.load(path).dump().splitlines() for path in (first, second))
    lines = list(difflib.unified_diff(before, after, str(first), str(second), lineterm=""))
    report({"equal": not lines, "diff": lines}, lines, as_json)


def _respelled(schedule: "Schedule", form: str, keeps: tuple[Any, ...]) -> dict[str, Any]:
    """The document's data with its keeps in another form."""
    from vtr_export.schedule_document import plain

    data = plain(schedule.document) | {"vision": (), "decode": ()}
    prefill = {k: v for k, v in data["prefill"].items() if k not in set(Form)}
    return data | {"prefill": {**prefill, form: keeps}}


def _seen_from(file: Path, schedule: "Schedule") -> str | None:
    """``model:`` as it must be written in ``file`` to mean the same folder."""
    location = schedule.model_location()
    if location is None or not Path(location).is_dir():
        return schedule.model  # a hub id
    return os.path.relpath(location, file.parent)


def _tokens(resolved: "Resolved") -> list[int] | None:
    n = resolved.tokens_per_image
    return None if n is None else list(resolved.keep_per_layer(n))


def _resolved_lines(resolved: "Resolved") -> list[str]:
    tokens = _tokens(resolved)
    if tokens is not None:
        return [f"vision tokens per layer: {runs(tokens)}"]
    return [
        f"before layer {cut.before_layer}: {cut.keep.numerator}/{cut.keep.denominator} of them"
        for cut in resolved.cuts
    ]


def _write(schedule: "Schedule", out: Path | None) -> None:
    """To stdout, or to a file that says where it went."""
    if out is None:
        typer.echo(schedule.dump(), nl=False)
        return
    try:
        out.write_text(schedule.dump(), encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write the schedule: {error.strerror}", where=str(out), hint="check --out"
        ) from None
    typer.echo(f"wrote {out}")
