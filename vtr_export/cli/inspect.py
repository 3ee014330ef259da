"""``vtr inspect``: what a graph, an artifact or an engine is made of."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vtr_export.cli.inspect_lines import graph_lines
from vtr_export.cli.output import Json, columns, report, runs
from vtr_export.errors import InputError
from vtr_export.process import size

if TYPE_CHECKING:
    from vtr_export.engine_manifest import Engine, EngineManifest
    from vtr_export.graph_facts import GraphFacts
    from vtr_export.manifest import Manifest

OF_THE_DECODER: Final = ("layers", "streams", "stages", "masks")
"""Of the JSON, beside the lists of each graph: those of the decoder, where scripts look."""


def inspect(
    path: Annotated[Path, typer.Argument(help="ONNX file, artifact or engine.")],
    layer: Annotated[
        int | None, typer.Option(help="What would a cut before this layer narrow?")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show layers, attention, streams and stages of a graph."""
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
    values |= {name: _decoder(graphs, manifest)[name] for name in OF_THE_DECODER}
    for graph in graphs:
        lines += ["", *graph_lines(graph)]
    report(values, lines, as_json)


def _decoder(graphs: "Sequence[GraphFacts]", manifest: "Manifest | None") -> dict[str, Any]:
    """The graph that stands for all: an artifact's decoder, or the only one."""
    name = None if manifest is None else Path(manifest.graphs.decoder).name
    chosen = next((graph for graph in graphs if Path(graph.file).name == name), graphs[0])
    return chosen.to_json()


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


def _runs(manifest: "Manifest") -> str:
    """Keeps of all layers, which a threshold makes upper bounds."""
    from vtr_export.schedule import Schedule

    keeps = runs(manifest.schedule.keep_per_layer or ())
    is_bound = Schedule.parse(manifest.schedule.text).prefill.threshold is not None
    return f"at most {keeps}" if is_bound else keeps


def _manifest_rows(manifest: "Manifest") -> list[tuple[str, str]]:
    keeps = manifest.schedule.keep_per_layer
    stages = [stage.first_layer for stage in manifest.model.stages]
    return [
        ("model", f"{manifest.source.model} ({manifest.model.model_type})"),
        ("dtype", manifest.dtype),
        ("weights", manifest.weights.mode),
        ("verified", manifest.scope if manifest.verified else "no"),
        ("vision tokens per layer", "vary with the image" if keeps is None else _runs(manifest)),
        ("stages begin at layers", ", ".join(map(str, stages))),
        ("tunable", "yes" if manifest.tunable else "no"),
        (
            "made with",
            f"vtr-export {manifest.versions.vtr_export}, opset {manifest.versions.opset}",
        ),
    ]
