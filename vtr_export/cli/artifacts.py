"""``vtr bench``: what was made, beside what it was made from."""

from pathlib import Path
from typing import Annotated

import typer

from vtr_export.cli.output import Json, columns, progress, report, runs
from vtr_export.cli.run import Device

Artifact = Annotated[Path, typer.Argument(help="Folder that vtr export or vtr build published.")]


def bench(
    artifact: Artifact,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Another artifact or engine of its model; default: this one, dropping nothing. "
            "An engine's kernels are chosen for what it keeps: one built without cuts is fairer."
        ),
    ] = None,
    images: Annotated[int, typer.Option(help="In the prompt.")] = 1,
    vision_tokens: Annotated[
        int | None, typer.Option(help="Of the prompt, where an image's tokens vary.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="Of the prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Of the answer.")] = 16,
    repeats: Annotated[int, typer.Option(help="Interleaved runs; the median counts.")] = 7,
    threads: Annotated[
        int | None, typer.Option(help="Of ONNX Runtime; default: all cores.")
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(help="This one or not at all; default: cpu, of an engine cuda."),
    ] = None,
    predict: Annotated[
        str, typer.Option(help="The machine predicted for: orin-nx, agx-orin, rtx-4090, h100, cpu.")
    ] = "cpu",
    as_json: Json = False,
) -> None:
    """Time an artifact or engine beside its unpruned twin."""
    from vtr_export.bench import bench as measure

    with progress() as announce:
        done = measure(
            artifact,
            against=against,
            images=images,
            vision_tokens=vision_tokens,
            text_tokens=text_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            threads=threads,
            device=device,
            predict=predict,
            progress=announce,
        )
    lines = [*columns(done.rows()), f"unpruned: {done.against}"]
    lines.append(f"predicted: milliseconds by roofline on {done.predicted_for}, prefill by FLOPs")
    lines.append(f"vision tokens per layer: {runs(done.vision_tokens_per_layer)}")
    report(done.to_json(), lines, as_json)
