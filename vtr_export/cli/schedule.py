"""``vtr schedule``: make, show, convert and compare schedules."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtr_export.cli.output import PLAIN
from vtr_export.cli.schedule_files import Out, convert, diff, show, write

if TYPE_CHECKING:
    from vtr_export.schedule import Schedule

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


class Rule(StrEnum):
    """What attention makes of a token's rank."""

    ATTENTION = "attention"
    SELF_CROSS = "self_cross"
    REDUNDANCY = "redundancy"


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
    ATTENDED = "attended"


class Rounding(StrEnum):
    """How a share becomes an integer."""

    FLOOR = "floor"
    CEIL = "ceil"


Tokens = Annotated[
    int | None,
    typer.Option(help="Vision tokens of an image: write integers, rounded as published."),
]


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
    positions: Annotated[
        Positions, typer.Option(help="Survivors keep their positions; PyramidDrop's code repacks.")
    ] = Positions.ORIGINAL,
    out: Out = None,
) -> None:
    """PyramidDrop: keep a share of what is left, part by part."""
    from vtr_export.schedule import Schedule

    shape: dict[str, Any] = {"layers": layers, "parts": parts, "tokens": tokens}
    _write(Schedule.pyramid(ratio, **shape, positions=positions.value), out)


@app.command()
def sparsevlm(
    tokens: Annotated[int, typer.Option(help="The published list: 192, 128, 96 or 64.")] = 192,
    plus: Annotated[bool, typer.Option("--plus", help="Of SparseVLM+.")] = False,
    out: Out = None,
) -> None:
    """SparseVLM: published keeps after layers 2, 6 and 15, for 576 tokens and 32 layers."""
    from vtr_export.schedule import Schedule

    _write(Schedule.sparsevlm(tokens, plus=plus), out)


@app.command()
def mustdrop(
    tokens: Annotated[int, typer.Option(help="The published thresholds: 192, 128 or 64.")] = 192,
    windows: Annotated[
        int | None, typer.Option(help="Merged in the tower; else as many as are alike.")
    ] = None,
    out: Out = None,
) -> None:
    """MustDrop: like patches merged, thresholds after layers 2, 6, 10 and 14, one cache."""
    from vtr_export.schedule import Schedule

    _write(Schedule.mustdrop(tokens, windows=windows), out)


@app.command()
def fitprune(
    reduction: Annotated[str, typer.Option(help="FLOPs it saves: 50%, 60% or 90%.")] = "60%",
    out: Out = None,
) -> None:
    """FitPrune: a published recipe for LLaVA-1.5-7B, a number for every layer."""
    from vtr_export.schedule import Schedule

    _write(Schedule.fitprune(reduction), out)


@app.command()
def ficoco(
    vision: Annotated[
        int | None, typer.Option(help="Leave each later layer of the tower; its code: 42.")
    ] = None,
    prefill: Annotated[
        int | None, typer.Option(help="Leave each layer of the decoder from 5 on; its code: 14.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Of the decoder.")] = 32,
    tokens: Annotated[int, typer.Option(help="Of an image that enter the decoder.")] = 576,
    out: Out = None,
) -> None:
    """FiCoCo-V, FiCoCo-L or both: tokens leave layer by layer, for those like them."""
    from vtr_export.schedule import Schedule

    _write(Schedule.ficoco(vision, prefill, layers=layers, tokens=tokens), out)


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
    rule: Annotated[
        Rule,
        typer.Option(help="What rows give a token, FitPrune's product, FiCoCo-L's difference."),
    ] = Rule.ATTENTION,
    rank: Annotated[
        Rank, typer.Option(help="One budget for all images, or each its own.")
    ] = Rank.JOINT,
    positions: Annotated[
        Positions, typer.Option(help="Survivors keep their positions, or are numbered anew.")
    ] = Positions.ORIGINAL,
    drop_point: Annotated[
        DropPoint,
        typer.Option(help="Between two layers, or inside the first: before its o_proj or its MLP."),
    ] = DropPoint.BETWEEN,
    rounding: Annotated[Rounding, typer.Option(help="Of shares.")] = Rounding.FLOOR,
    out: Out = None,
) -> None:
    """An explicit list: one keep per decoder layer."""
    from vtr_export.schedule import Schedule

    words = [word for value in values for word in value.replace(",", " ").split()]
    numbers = [int(word) if word.isdecimal() else word for word in words]
    options: dict[str, Any] = {
        "score": {
            **{"from": score_from.value, "rule": rule.value},
            **{"query": query.value, "heads": heads.value},
        },
        "rank": rank.value,
        "positions": positions.value,
        "drop_point": drop_point.value,
        "rounding": rounding.value,
    }
    _write(Schedule.from_keeps(numbers, **options), out)


app.command()(show)
app.command()(convert)
app.command()(diff)


def _write(schedule: "Schedule", out: Path | None) -> None:
    write(schedule.dump(), out)
