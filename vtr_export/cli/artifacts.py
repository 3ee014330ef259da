"""``vtr bench`` and ``vtr inspect``: look at what was made."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtr_export.cli.output import Json, columns, progress, report, runs
from vtr_export.cli.run import Device

if TYPE_CHECKING:
    from vtr_export.inspection import GraphFacts
    from vtr_export.manifest import Manifest

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
    """Time an artifact or engine beside its unpruned twin and the prediction."""
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


def inspect(
    path: Annotated[Path, typer.Argument(help="ONNX file, or artifact.")],
    layer: Annotated[
        int | None, typer.Option(help="What would a cut before this layer narrow?")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show layers, token streams and cuts of any ONNX."""
    from vtr_export.inspection import inspect_path

    manifest, graphs = inspect_path(path, layer)
    values: dict[str, Any] = {"path": str(path), "artifact": None}
    lines: list[str] = []
    if manifest is not None:
        values["artifact"] = manifest.model_dump(mode="json", exclude={"files"})
        lines += columns(_manifest_rows(manifest))
    values["graphs"] = [graph.to_json() for graph in graphs]
    for graph in graphs:
        lines += ["", *_graph_lines(graph)]
    report(values, lines, as_json)


def _manifest_rows(manifest: "Manifest") -> list[tuple[str, str]]:
    keeps = manifest.schedule.keep_per_layer
    stages = [stage.first_layer for stage in manifest.model.stages]
    return [
        ("model", f"{manifest.source.model} ({manifest.model.model_type})"),
        ("dtype", manifest.dtype),
        ("weights", manifest.weights.mode),
        ("verified", manifest.scope if manifest.verified else "no"),
        ("vision tokens per layer", "vary with the image" if keeps is None else runs(keeps)),
        ("stages begin at layers", ", ".join(map(str, stages))),
        ("tunable", "yes" if manifest.tunable else "no"),
        (
            "made with",
            f"vtr-export {manifest.versions.vtr_export}, opset {manifest.versions.opset}",
        ),
    ]


def _graph_lines(graph: "GraphFacts") -> Iterator[str]:
    yield f"{graph.file}: opset {graph.opset}, {graph.nodes} nodes, by {graph.producer}"
    for what, tensors in (("in", graph.inputs), ("out", graph.outputs)):
        yield from columns([(what, t.name, t.dtype, t.shape, t.axes) for t in tensors])
    if graph.why_no_layers:
        yield f"layers: none; {graph.why_no_layers}"
    else:
        rows = [
            (f"layer {each.index}", each.entry, each.attention, each.past_key, each.mask)
            for each in graph.layers
        ]
        yield from columns([("", "entered by", "attention", "past", "mask"), *rows])
    for cut in graph.cuts:
        streams = ", ".join(cut.streams)
        yield f"cut before layer {cut.before_layer}: keeps {cut.keep}, narrows {streams}"
    if graph.crossing is not None:
        crossing = graph.crossing
        yield f"a cut before layer {crossing.before_layer} would narrow:"
        yield f"  {crossing.entry} (by score)"
        yield from (f"  {name}" for name in crossing.streams)
        yield from (f"  {name} (mask, made again)" for name in crossing.masks)
    for lost in graph.lost:
        yield f"tokens are lost at {lost.operator} {lost.node!r}: {'; '.join(lost.inputs)}"
        yield f"  trail: {' > '.join(lost.trail)}"
