"""``vtr schedule show``, ``convert`` and ``diff``: schedules and recipes that are there."""

import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtr_export.cli.output import Json, report, runs, warn
from vtr_export.cli.plan import facts_of
from vtr_export.errors import CheckpointError, InputError, ScheduleError

if TYPE_CHECKING:
    from vtr_export.drawing import Curve
    from vtr_export.families import ModelFacts
    from vtr_export.schedule import Schedule
    from vtr_export.steps import Steps


class Notation(StrEnum):
    """How a publication spells its recipes."""

    FASTV = "fastv"
    PYRAMIDDROP = "pyramiddrop"
    SPARSEVLM = "sparsevlm"
    VTW = "vtw"
    FITPRUNE = "fitprune"


class Form(StrEnum):
    """How the keeps are spelled: in our language's two forms, or as a publication's code has it."""

    KEEP = "keep"
    STAGES = "stages"
    FASTV = "fastv"
    PYRAMIDDROP = "pyramiddrop"
    SPARSEVLM = "sparsevlm"
    VTW = "vtw"
    FITPRUNE = "fitprune"


Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write it there, not to stdout.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder with a config.json, or cached hub id.")
]
Layers = Annotated[int | None, typer.Option(min=1, help="Decoder layers, without a model.")]
Tokens = Annotated[
    int | None, typer.Option(min=1, help="Vision tokens of an image, without a model.")
]
Picture = Annotated[
    Path | None, typer.Option(help="Draw the keeps of every layer: FILE.png or FILE.svg.")
]
File = Annotated[Path, typer.Argument(help="Schedule (YAML), or a published recipe.")]


def show(
    schedules: Annotated[
        list[Path], typer.Argument(help="Schedules (YAML) or published recipes.", metavar="FILE...")
    ],
    model: Model = None,
    layers: Layers = None,
    tokens: Tokens = None,
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """Every field with its default, and what each layer keeps; several: only their curves."""
    loaded = [_load(path) for path in schedules]
    facts = [_facts(each, model) for each in loaded]
    steps = [_steps(each, known, layers, tokens) for each, known in zip(loaded, facts, strict=True)]
    curves = _curves(schedules, steps)
    _draw(curves, picture)
    values = [_values(*each) for each in zip(loaded, facts, steps, strict=True)]
    if len(loaded) == 1:
        lines = [*loaded[0].dump().splitlines(), "", *_numbers(steps[0]), *_chart(curves)]
        if loaded[0].prefill.threshold is not None:
            lines.append("all of these at most: how many a threshold drops depends on the prompt")
        report(values[0], lines, as_json)
        return
    report({"schedules": values}, _chart(curves), as_json)


def convert(
    schedule: Annotated[
        Path, typer.Argument(help="Schedule (YAML) or published recipe; - reads stdin.")
    ],
    to: Annotated[
        Form | None,
        typer.Option(help="One keep per layer, only where it changes, or a paper's own notation."),
    ] = None,
    written: Annotated[
        Notation | None, typer.Option("--from", help="Whose recipe it is; else its names say it.")
    ] = None,
    model: Model = None,
    layers: Layers = None,
    tokens: Tokens = None,
    out: Out = None,
) -> None:
    """Read a published recipe, or respell a schedule: in the other form, or as a recipe."""
    from vtr_export import recipes
    from vtr_export.schedule import Schedule

    parsed = _load(schedule, written, tokens)
    if to is None:
        write(_moved(parsed, out).dump(), out)
        return
    steps = _steps(parsed, _facts(parsed, model), layers, tokens)
    if to not in (Form.KEEP, Form.STAGES):
        write(recipes.write(parsed, steps, to.value), out)
        return
    data = _respelled(parsed, to, steps)
    write(_moved(Schedule.from_data(data, parsed.source), out).dump(), out)


def diff(
    first: File,
    second: File,
    model: Model = None,
    layers: Layers = None,
    tokens: Tokens = None,
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """What differs, defaults written out, and what each layer keeps side by side."""
    files = first, second
    loaded = [_load(path) for path in files]
    steps = [_steps(each, _facts(each, model), layers, tokens) for each in loaded]
    curves = _curves(files, steps)
    _draw(curves, picture)
    before, after = (each.dump().splitlines() for each in loaded)
    lines = list(difflib.unified_diff(before, after, str(first), str(second), lineterm=""))
    chart = ["", *_chart(curves)] if lines else []
    report({"equal": not lines, "diff": lines}, [*lines, *chart], as_json)


def write(text: str, out: Path | None) -> None:
    """To stdout, or to a file that says where it went."""
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write the schedule: {error.strerror}", where=str(out), hint="check --out"
        ) from None
    typer.echo(f"wrote {out}")


def _load(path: Path, notation: Notation | None = None, tokens: int | None = None) -> "Schedule":
    from vtr_export import recipes
    from vtr_export.schedule_yaml import read_text

    text = sys.stdin.read() if str(path) == "-" else read_text(path)
    name = "<stdin>" if str(path) == "-" else str(path)
    return recipes.read(text, name, notation and notation.value, tokens)


def _facts(schedule: "Schedule", model: str | None) -> "ModelFacts | None":
    """Facts of the model, if one is named; the schedule's own may be out of reach."""
    if model is None and schedule.model is None:
        return None
    try:
        return facts_of(schedule, model)
    except CheckpointError as error:
        if model is not None:
            raise
        warn([f"read without its model: {error.message}"])
        return None


def _steps(
    schedule: "Schedule", facts: "ModelFacts | None", layers: int | None, tokens: int | None
) -> "Steps":
    from vtr_export.steps import steps_of

    return steps_of(schedule, facts, layers=layers, tokens=tokens)


def _curves(files: Sequence[Path], steps: Sequence["Steps"]) -> list["Curve"]:
    from vtr_export.drawing import Curve

    names = [path.name for path in files]
    if len(set(names)) < len(names):
        names = [str(path) for path in files]
    return [Curve(name, each) for name, each in zip(names, steps, strict=True)]


def _draw(curves: Sequence["Curve"], file: Path | None) -> None:
    if file is None:
        return
    from vtr_export.drawing import picture

    picture(curves, file)
    typer.echo(f"drew {file}", err=True)


def _chart(curves: Sequence["Curve"]) -> list[str]:
    """Bars, of what the output can say."""
    from vtr_export.drawing import BLOCK, PLAIN, text

    try:
        BLOCK.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return text(curves, PLAIN)
    return text(curves)


def _values(schedule: "Schedule", facts: "ModelFacts | None", steps: "Steps") -> dict[str, Any]:
    """What ``show --json`` says of one schedule."""
    from vtr_export.schedule_document import plain

    values: dict[str, Any] = {"schedule": plain(schedule.document)}
    mean = steps.mean_share()
    if steps.layers is not None:
        values |= {"layers": steps.layers, "vision_tokens_per_layer": _tokens(steps)}
        values["mean_share"] = None if mean is None else float(mean)
    if facts is not None:
        cuts = schedule.resolve(facts).cuts
        values["cuts"] = [
            {"before_layer": cut.before_layer, "keep": [cut.keep.numerator, cut.keep.denominator]}
            for cut in cuts
        ]
    return values


def _tokens(steps: "Steps") -> list[int] | None:
    """Vision tokens entering each layer, where they are known."""
    amounts = steps.per_layer()
    if steps.tokens is None or amounts is None:
        return None
    return [int(amount) for amount in amounts]


def _numbers(steps: "Steps") -> Iterator[str]:
    """What is known of the layers, for people."""
    if tokens := _tokens(steps):
        yield f"vision tokens per layer: {runs(tokens)}"
    if (mean := steps.mean_share()) is not None:
        count = "" if steps.tokens is None else f"{float(mean * steps.tokens):.1f} tokens, "
        yield f"mean over the layers: {count}{float(mean):.1%}"


def _respelled(schedule: "Schedule", form: Form, steps: "Steps") -> dict[str, Any]:
    """The document's data with its keeps in another form."""
    from vtr_export.keeps import write_keep
    from vtr_export.schedule_document import plain

    amounts = steps.per_layer()
    if form is Form.STAGES:
        keeps = [{"before_layer": at, "keep": write_keep(keep)} for at, keep in steps.cuts]
    elif amounts is None:
        raise ScheduleError(
            "one keep per layer, but nothing says how many layers there are",
            where=schedule.source.name,
            hint="give --model, or --layers",
        )
    else:
        keeps = [write_keep(amount) for amount in amounts]  # type: ignore[misc]  # of another form
    data = plain(schedule.document) | {"vision": (), "decode": ()}
    prefill = {k: v for k, v in data["prefill"].items() if k not in (Form.KEEP, Form.STAGES)}
    return data | {"prefill": {**prefill, form.value: tuple(keeps)}}


def _moved(schedule: "Schedule", out: Path | None) -> "Schedule":
    """The same with ``model:`` as it must be written in ``out`` to mean the same folder."""
    from dataclasses import replace

    location = schedule.model_location()
    if out is None or location is None or not Path(location).is_dir():
        return schedule  # or a hub id
    model = os.path.relpath(location, out.parent)
    return replace(schedule, document=schedule.document.model_copy(update={"model": model}))
