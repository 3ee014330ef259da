"""Which commands there are, and how errors leave the process."""

import json
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from vtr_export import __version__
from vtr_export.cli import artifacts, export, machine, plan, run, schedule, verify
from vtr_export.cli.output import PLAIN
from vtr_export.errors import GateError, VtrError

app = typer.Typer(
    name="vtr",
    no_args_is_help=True,
    help="Deploy vision-language models on fewer tokens.",
    epilog="Exit status: 0 fine, 1 a gate failed, 2 bad input.",
    **PLAIN,
)
app.command()(export.export)
app.command()(plan.plan)
app.command()(run.run)
app.command()(verify.verify)
app.command()(artifacts.bench)
app.command()(artifacts.inspect)
app.command()(machine.doctor)
app.add_typer(schedule.app)

export_app = typer.Typer(name="vtr-export", **PLAIN)
export_app.command()(export.export)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def main() -> None:
    """``vtr``: a user's mistake prints plainly and exits 2, a failed gate exits 1."""
    guarded(app)


def export_main() -> None:
    """``vtr-export``: the same as ``vtr export``."""
    guarded(export_app)


def guarded(run: Callable[[], object]) -> None:
    """Run; our own bugs keep their traceback."""
    try:
        run()
    except VtrError as error:
        typer.echo(str(error), err=True)
        if "--json" in sys.argv:
            said = {"code": error.code, "message": error.message}
            said |= {"where": error.where, "hint": error.hint}
            typer.echo(json.dumps({"error": said}))
        raise SystemExit(1 if isinstance(error, GateError) else 2) from None
