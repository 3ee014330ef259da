"""``vtr plan``: what a schedule would do to a model, from its config alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtr_export.cli.output import Json, Plugin, Sms, Target, columns, report, runs, warn

if TYPE_CHECKING:
    from vtr_export.families import ModelFacts
    from vtr_export.plan import PlanReport
    from vtr_export.schedule import Schedule


def plan(
    schedule: Annotated[Path, typer.Option("--schedule", "-s", help="Schedule (YAML).")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Folder with a config.json, or cached hub id."),
    ] = None,
    convention: Annotated[
        str, typer.Option(help="How to count: F-A, F-B, F-C, F-D or exact.")
    ] = "F-A",
    text_tokens: Annotated[int, typer.Option(help="Of the prompt.")] = 64,
    images: Annotated[int, typer.Option(help="In the prompt.")] = 1,
    vision_tokens: Annotated[
        int | None, typer.Option(help="Of the prompt, where an image's tokens vary.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Of the answer.")] = 128,
    device: Annotated[
        str | None, typer.Option(help="Predict times: orin-nx, agx-orin, rtx-4090, h100 or cpu.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="fp32, fp16, bf16, int8, int4, fp8 or fp4.")
    ] = "fp16",
    dtype: Annotated[
        str | None, typer.Option(help="Of activations; default: as --weights say, or fp16.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Does it fit? 8GiB, 500MB, bytes.")] = None,
    target: Target = "onnxruntime",
    sm: Sms = None,
    plugin: Plugin = "auto",
    as_json: Json = False,
) -> None:
    """Predict tokens, FLOPs, bytes, fit and time. No weight is read."""
    from vtr_export.plan import plan as predict
    from vtr_export.schedule import Schedule
    from vtr_export.targets import parse_sms

    parsed = Schedule.load(schedule)
    done = predict(
        parsed,
        facts_of(parsed, model),
        convention=convention,
        text_tokens=text_tokens,
        images=images,
        batch=batch,
        new_tokens=new_tokens,
        vision_tokens=vision_tokens,
        device=device,
        weights=weights,
        memory=memory,
        target=target,
        sms=parse_sms(sm) if sm is not None else (),
        dtype=dtype,
        plugin=plugin,
    )
    warn(done.notes)
    report(done.to_json(), _lines(done), as_json)


def _lines(done: "PlanReport") -> Iterator[str]:
    yield from columns([("", "unpruned", "pruned"), *done.rows()])
    yield f"vision tokens per layer: {runs(done.vision_tokens_per_layer)}"
    yield f"{done.convention} counts {done.formula} per layer, in {done.unit}"
    yield f"target {done.target}: {_target(done)}"
    yield from (f"limit: {limit}" for limit in done.limits)
    if done.parses is not None:
        yield f"parses: {done.parses}"
    yield f"ideal prefill speed-up, counted exactly: {done.ideal_speedup:.3f}"


def _target(done: "PlanReport") -> str:
    """What was checked of the target."""
    sms = ", ".join(f"{sm // 10}.{sm % 10}" for sm in done.sms)
    return f"{done.dtype} on SM {sms}" if sms else done.dtype


def facts_of(schedule: "Schedule", model: str | None) -> "ModelFacts":
    """Facts of ``model``, or else of the model that the schedule names."""
    from vtr_export.checkpoint import find_folder, read_model_facts
    from vtr_export.errors import ScheduleError

    location = model if model is not None else schedule.model_location()
    if location is None:
        raise ScheduleError(
            "the schedule names no model",
            where=schedule.source.name,
            hint="add `model: FOLDER` to it, or give --model",
        )
    folder = find_folder(location)
    return read_model_facts(folder)
