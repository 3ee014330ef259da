"""What every command prints: reports on stdout, progress and warnings on stderr."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer

PLAIN: Final[dict[str, Any]] = {
    "add_completion": False,
    "rich_markup_mode": None,  # help without rich: it would cost half of the start
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 100},
}
Json = Annotated[bool, typer.Option("--json", help="Make the last line of stdout one JSON object.")]
Target = Annotated[
    str,
    typer.Option(
        help="onnxruntime; or also tensorrt, tensorrt-rtx or tensorrt-10: refuse what it cannot."
    ),
]
Sms = Annotated[
    str | None, typer.Option("--sm", help="GPUs to build for: 86,89,120 or 8.6,8.9,12.0.")
]
Plugin = Annotated[
    str, typer.Option("--plugin", help="Our CUDA plugin for cuts: auto (where needed), on or off.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the modelling code that the checkpoint brings."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]


def report(values: Mapping[str, Any], lines: Iterable[str], as_json: bool) -> None:
    """One JSON object on one line, or the lines for people."""
    if as_json:
        typer.echo(json.dumps(values, allow_nan=False))
        return
    for line in lines:
        typer.echo(line)


def warn(messages: Iterable[str]) -> None:
    """Each on a line of stderr."""
    for message in messages:
        typer.echo(f"warning: {message}", err=True)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned text."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def runs(numbers: Sequence[int]) -> str:
    """``576 x2, 288 x30``: equal neighbours counted."""
    counted: list[list[int]] = []
    for number in numbers:
        if counted and counted[-1][0] == number:
            counted[-1][1] += 1
        else:
            counted.append([number, 1])
    return ", ".join(f"{number} x{count}" for number, count in counted)


class Progress:
    """Announces each step on stderr, a line each."""

    def __call__(self, step: str) -> None:
        """A step begins."""
        typer.echo(step, err=True)

    def detail(self, text: str) -> None:
        """How far it is: for those who watch."""


class _Spinner(Progress):
    """The step under way with its detail, and a line for each that is done."""

    def __init__(self, console: Any, status: Any) -> None:
        self.console, self.status = console, status
        self.step, self.since = "", 0.0

    def __call__(self, step: str) -> None:
        self.end()
        self.step, self.since = step, time.perf_counter()
        self.status.update(step)

    def detail(self, text: str) -> None:
        self.status.update(f"{self.step}: {text}")

    def end(self) -> None:
        """The last step is done."""
        if self.step:
            self.console.print(f"{time.perf_counter() - self.since:7.1f} s  {self.step}")


@contextmanager
def progress() -> Iterator[Progress]:
    """What announces steps: a spinner on a terminal, else lines."""
    if not sys.stderr.isatty():
        yield Progress()
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.status("starting") as status:
        spinner = _Spinner(console, status)
        yield spinner
        spinner.end()
