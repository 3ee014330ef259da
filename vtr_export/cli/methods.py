"""``vtr bench methods``: which reduction is worth it on a model and its questions."""

import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Final

import typer

from vtr_export.cli.output import Json, progress, report
from vtr_export.errors import InputError
from vtr_export.extras import require

PLACES: Final = ("--out", "-o", "--work")  # options that say nothing of what is measured


def bench_methods(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or cached hub id.")],
    questions: Annotated[
        Path,
        typer.Option("--questions", "-q", help="JSONL of image, question, answers; or its folder."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for methods.md, .svg and .json.")
    ] = Path(),
    method: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be repeated. Default: all.")
    ] = None,
    schedule: Annotated[
        list[Path] | None, typer.Option(help="This schedule too, as it is; may be repeated.")
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(help="Of the tokens, mean over layers; default: 0.5, 0.25 and 0.125."),
    ] = None,
    metric: Annotated[str, typer.Option(help="exact, vqa, relaxed or contains.")] = "exact",
    limit: Annotated[int | None, typer.Option(help="Draw so many questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 16,
    threads: Annotated[int, typer.Option(help="Of ONNX Runtime.")] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds of timing; the median counts.")] = 31,
    steps: Annotated[int, typer.Option(help="Tokens decoded in a timed answer.")] = 16,
    work: Annotated[
        Path | None, typer.Option(help="Keep the artifacts here; default: a temporary folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare every reduction on your questions.

    Written ``vtr bench methods``. Every method is exported once, asked every question in ONNX
    Runtime, and timed in turns with the unpruned model.
    """
    from vtr_export.pareto.measure import compare
    from vtr_export.pareto.measured import Report
    from vtr_export.pareto.methods import SHARES
    from vtr_export.pareto.page import markdown, write

    for package in ("matplotlib", "scipy"):  # before a long run, not after it
        require(package, "search", "a comparison")
    if not out.is_dir():
        raise InputError("there is no such folder", where=str(out), hint=f"mkdir {out}")

    def measured(folder: Path) -> Report:
        return compare(
            model,
            questions,
            work=folder,
            methods=method or (),
            schedules=schedule or (),
            shares=share or SHARES,
            metric=metric,
            limit=limit,
            max_new_tokens=max_new_tokens,
            threads=threads,
            repeats=repeats,
            steps=steps,
            command=_command(),
            progress=announce,
        )

    with progress() as announce:
        if work is not None:
            work.mkdir(parents=True, exist_ok=True)
            done = measured(work)
        else:
            with TemporaryDirectory(prefix="vtr-methods-") as folder:
                done = measured(Path(folder))
    write(done, out)
    report(done.to_json(), markdown(done).splitlines(), as_json)


def spell_out(arguments: list[str]) -> list[str]:
    """``vtr bench methods`` as the command that it is; a folder of that name is ``./methods``."""
    if arguments[1:3] == ["bench", "methods"]:
        return [arguments[0], "bench-methods", *arguments[3:]]
    return arguments


def _command() -> str:
    """As it was given, without places of this machine."""
    words, places = iter(sys.argv[2:]), list[str]()
    for word in words:
        if word in PLACES:
            next(words, None)
        else:
            places.append(Path(word).name if Path(word).is_absolute() else word)
    return shlex.join(["vtr", "bench", "methods", *places])
