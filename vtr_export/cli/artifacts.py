"""``vtr bench`` and ``vtr inspect``: look at what was made."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtr_export.cli.output import Json, columns, progress, report, runs, size
from vtr_export.cli.run import Device
from vtr_export.errors import InputError

if TYPE_CHECKING:
    from vtr_export.engine_manifest import Engine, EngineManifest
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


def inspect(
    path: Annotated[Path, typer.Argument(help="ONNX file, artifact or engine.")],
    layer: Annotated[
        int | None, typer.Option(help="What would a cut before this layer narrow?")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show layers, streams and cuts of any ONNX, or an engine."""
    from vtr_export.published import MANIFEST, kind_of

    if (path / MANIFEST).is_file() and kind_of(path) == "engine":
        _inspect_engine(path, layer, as_json)
        return
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


def _inspect_engine(folder: Path, layer: int | None, as_json: bool) -> None:
    """Plans are not deserialised: what they take stands in the manifest."""
    if layer is not None:
        raise InputError(
            "the layers of a plan cannot be told apart",
            where=str(folder),
            hint="vtr inspect ARTIFACT --layer N shows those of its graph",
        )
    from vtr_export.engine_manifest import EngineManifest

    manifest = EngineManifest.load(folder)
    values = {
        "path": str(folder),
        "artifact": manifest.artifact.model_dump(mode="json", exclude={"files"}),
        "engine": manifest.model_dump(mode="json", exclude={"artifact"}),
        "graphs": [],
    }
    lines = columns([*_manifest_rows(manifest.artifact), *_build_rows(manifest)])
    for engine in manifest.engines:
        lines += ["", *_engine_lines(engine, manifest.files[engine.file].bytes)]
    report(values, lines, as_json)


def _build_rows(manifest: "EngineManifest") -> list[tuple[str, str]]:
    plugin, built = manifest.plugin, manifest.versions
    return [
        ("built by", f"{built.target} {built.tensorrt}, vtr-export {built.vtr_export}"),
        ("for", ", ".join(f"SM {sm // 10}.{sm % 10}" for sm in manifest.sms)),
        ("plugin", "none" if plugin is None else f"version {plugin.version}, {plugin.sha256}"),
        ("cuts left open", ", ".join(map(str, manifest.opened_cuts)) or "none"),
    ]


def _engine_lines(engine: "Engine", size_bytes: int) -> Iterator[str]:
    """One line an input; equal ranges of a layer's cache are shown once."""
    plugin = f", {engine.plugin_layers} of the plugin" if engine.plugin_layers else ""
    yield f"{engine.file}: {size(size_bytes)}, {engine.layers} layers{plugin}"
    for number, profile in enumerate(engine.profiles):
        yield f"profile {number}, {profile.name}: least, best, most"
        rows: dict[tuple[str, ...], str] = {}
        for name, bounds in profile.inputs.items():
            ranges = tuple(map(_dims, (bounds.least, bounds.best, bounds.most)))
            rows.setdefault(ranges, name)
        counts = Counter(
            tuple(map(_dims, (b.least, b.best, b.most))) for b in profile.inputs.values()
        )
        yield from columns(
            [("  " + name, *ranges, _more(counts[ranges])) for ranges, name in rows.items()]
        )


def _dims(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _more(count: int) -> str:
    return f"and {count - 1} more" if count > 1 else ""


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
