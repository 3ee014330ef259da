"""Which commands there are, and how errors leave the process."""

import json
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Final

import typer

from vtr_export import __version__
from vtr_export.cli import (
    artifacts,
    build,
    build_plugin,
    export,
    inspect,
    machine,
    methods,
    plan,
    run,
    schedule,
    search,
    verify,
)
from vtr_export.cli.output import PLAIN
from vtr_export.errors import GateError, VtrError

FAULT: Final = 70  # EX_SOFTWARE of sysexits.h: neither a gate nor the input

app = typer.Typer(
    name="vtr",
    no_args_is_help=True,
    help="Deploy vision-language models on fewer tokens.",
    epilog="Exit status: 0 fine, 1 a gate failed, 2 bad input, 3 not executed, 70 a bug of ours, "
    "130 interrupted.",
    **PLAIN,
)
app.command()(export.export)
app.command()(build.build)
app.command()(build_plugin.build_plugin)
app.command()(plan.plan)
app.command()(run.run)
app.command()(verify.verify)
app.command()(artifacts.bench)
app.command()(methods.bench_methods)
app.command()(inspect.inspect)
app.command()(machine.doctor)
app.add_typer(schedule.app)
app.add_typer(search.app)

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
    sys.argv = methods.spell_out(search.spell_out(sys.argv))
    guarded(app)


def export_main() -> None:
    """``vtr-export``: the same as ``vtr export``."""
    guarded(export_app)


def guarded(run: Callable[[], object]) -> None:
    """Run; with ``--json`` an error is the last line of stdout. Our bugs keep their traceback."""
    try:
        run()
    except VtrError as error:
        typer.echo(str(error), err=True)
        _report(error.code, error.message, error.where, error.hint)
        raise SystemExit(1 if isinstance(error, GateError) else 2) from None
    except SystemExit as stop:
        if stop.code == 2:  # typer has said on stderr what does not parse
            _report("usage", "the command line does not parse", "", "stderr and --help say why")
        raise
    except Exception as error:
        traceback.print_exc()
        _report("bug", f"{type(error).__name__}: {error}", "", "report it with the traceback")
        raise SystemExit(FAULT) from None


def _report(code: str, message: str, where: str, hint: str) -> None:
    if "--json" in sys.argv:
        said = {"code": code, "message": message, "where": where, "hint": hint}
        typer.echo(json.dumps({"error": said}))
