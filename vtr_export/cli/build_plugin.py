"""``vtr build-plugin``: the plugin's sources to a library."""

from pathlib import Path
from typing import Annotated

import typer

from vtr_export.cli.output import Json, progress, report


def build_plugin(
    sm: Annotated[
        str | None,
        typer.Option(help="Compute capabilities, 86,89 or 8.6,8.9; default: all that nvcc knows."),
    ] = None,
    tensorrt_root: Annotated[
        Path | None,
        typer.Option(help="A TensorRT or its include folder; default: TENSORRT_ROOT, the system."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder; default: VTR_PLUGIN_PATH or the user's cache."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile the TensorRT plugin with nvcc. `vtr build` finds it from then on."""
    from vtr_export.backends.tensorrt.compile_plugin import compile_plugin, summary
    from vtr_export.targets import parse_sms

    with progress() as announce:
        built = compile_plugin(parse_sms(sm) if sm else (), tensorrt_root, out, announce)
    report(built.to_json(), summary(built), as_json)
