"""``vtr build``: artifact to TensorRT engines."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vtr_export.cli.output import Json, Plugin, Sms, Verbose, columns, progress, report, warn
from vtr_export.process import size


def build(
    artifact: Annotated[Path, typer.Argument(help="Folder that vtr export published.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Engine folder; default: ARTIFACT/TARGET.")
    ] = None,
    target: Annotated[str, typer.Option(help="tensorrt-rtx or tensorrt.")] = "tensorrt-rtx",
    sm: Sms = None,
    plugin: Plugin = "auto",
    max_batch: Annotated[int | None, typer.Option(help="Rows of a call; default 1.")] = None,
    max_vision_tokens: Annotated[
        int | None, typer.Option(help="Of a prompt; default: one image's.")
    ] = None,
    max_text_tokens: Annotated[int | None, typer.Option(help="Of a prompt; default 512.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer; default 512.")] = None,
    opt_batch: Annotated[int | None, typer.Option(help="Kernels are chosen for; 1.")] = None,
    opt_vision_tokens: Annotated[
        int | None, typer.Option(help="Kernels are chosen for; one image's.")
    ] = None,
    opt_text_tokens: Annotated[int | None, typer.Option(help="Kernels are chosen for; 64.")] = None,
    opt_new_tokens: Annotated[int | None, typer.Option(help="Kernels are chosen for; 128.")] = None,
    workspace_mib: Annotated[
        int | None, typer.Option("--workspace", min=1, help="MiB of scratch memory; default: all.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="0 builds fast, 5 runs fast; default: 3.")
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Build an artifact that nobody verified.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Build TensorRT engines of an artifact. TensorRT-RTX needs no GPU."""
    ranges = {
        "max_batch": max_batch,
        "max_vision_tokens": max_vision_tokens,
        "max_text_tokens": max_text_tokens,
        "max_new_tokens": max_new_tokens,
        "opt_batch": opt_batch,
        "opt_vision_tokens": opt_vision_tokens,
        "opt_text_tokens": opt_text_tokens,
        "opt_new_tokens": opt_new_tokens,
    }
    from vtr_export.builder import build as build_engines
    from vtr_export.targets import parse_sms

    with progress() as announce:
        done = build_engines(
            artifact,
            out,
            target=target,
            sms=() if sm is None else parse_sms(sm),
            plugin=plugin,
            ranges=ranges,
            workspace_bytes=None if workspace_mib is None else workspace_mib << 20,
            optimization_level=optimization_level,
            unverified=unverified,
            progress=announce,
            detail=announce.detail,
        )
    warn(done.warnings)
    values = done.to_json()
    report(values, built_lines(values, verbose), as_json)


def built_lines(done: Mapping[str, Any], verbose: bool) -> Iterator[str]:
    """What was built, for people; ``done`` is a BuildReport as JSON."""
    made = f"{done['engine']}: {done['target']} {done['tensorrt']}, "
    made += f"SM {', '.join(map(str, done['sms']))}"
    if done["up_to_date"]:
        yield f"up to date: {made}"
        return
    yield f"wrote {made}"
    yield from columns([_row(engine) for engine in done["engines"]])
    if done["opened_cuts"]:
        numbers = ", ".join(map(str, done["opened_cuts"]))
        yield f"cuts that could drop nothing were left out: {numbers}"
    yield f"plugin: {done['plugin'] or 'none, cuts are layers of TensorRT'}"
    yield "built, not run: vtr verify replays the golden vectors on a GPU"
    if verbose:
        yield from columns([(f"{took:8.2f} s", name) for name, took in done["steps"].items()])


def _row(engine: Mapping[str, Any]) -> tuple[str, ...]:
    ratio = engine["peak_rss_bytes"] / engine["bytes"]
    return (
        f"  {engine['component']}",
        size(engine["bytes"]),
        f"{engine['seconds']:.1f} s",
        f"peak RSS {size(engine['peak_rss_bytes'])} ({ratio:.1f} x)",
        f"{engine['layers']} layers",
        f"{engine['plugin_layers']} of the plugin",
    )
