"""Keep-per-layer curves: as text, and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final

from vtr_export.errors import InputError
from vtr_export.extras import require
from vtr_export.keeps import write_keep
from vtr_export.steps import Steps

BLOCK, PLAIN = "█", "#"  # what a bar is made of, where the output can say it and where not
PICTURES: Final = ("png", "svg")
WIDTH: Final = 80
_LEAST_BAR: Final = 6


@dataclass(frozen=True)
class Curve:
    """A schedule's steps under a name."""

    name: str
    steps: Steps


def text(curves: Sequence[Curve], block: str = BLOCK) -> list[str]:
    """A line for each run of layers with the same keeps: layers, then each curve's keep and bar.

    At most :data:`WIDTH` columns, for up to four curves.
    """
    known = [curve.steps.layers for curve in curves if curve.steps.layers is not None]
    end = max(known, default=None)
    turns = {first for curve in curves for first, _ in curve.steps.runs()} | set(known)
    firsts = sorted(first for first in turns if end is None or first < end)
    labels = _labels(firsts, end)
    left = max(map(len, labels))
    room = max((WIDTH - left) // len(curves) - 2, _LEAST_BAR)
    columns = [_column(curve.steps, firsts, room, block) for curve in curves]
    lines = list(zip(labels, *columns, strict=True))
    if len(curves) > 1:
        lines.insert(0, ("", *(curve.name[-room:].ljust(room) for curve in curves)))
    return ["  ".join([label.rjust(left), *cells]).rstrip() for label, *cells in lines]


def _labels(firsts: Sequence[int], layers: int | None) -> list[str]:
    """``layers 0-1``: the runs that begin with ``firsts``."""
    ends = [*firsts[1:], layers]
    names = []
    for first, end in zip(firsts, ends, strict=True):
        last = "" if end is None else f"{end - 1}"
        names.append(f"{first}" if last == f"{first}" else f"{first}-{last}")
    return ["layers " + names[0], *names[1:]]


def _column(steps: Steps, firsts: Sequence[int], room: int, block: str) -> list[str]:
    """A curve's keep and bar in each run; nothing after its last layer."""
    amounts = [steps.at(first) for first in firsts]
    said = [str(write_keep(amount)) for amount in amounts]
    width = max(map(len, said))
    longest = max(room - width - 1, _LEAST_BAR)
    cells = []
    for first, amount, keep in zip(firsts, amounts, said, strict=True):
        share = steps.share(amount) or Fraction()
        bar = block * max(round(share * longest), share > 0)
        is_past = steps.layers is not None and first >= steps.layers
        cells.append(" " * room if is_past else f"{keep:>{width}} {bar:<{longest}}")
    return cells


def picture(curves: Sequence[Curve], file: Path) -> None:
    """Draw the curves into a PNG or an SVG, the share kept over the decoder's layers.

    Needs matplotlib (UnavailableError). InputError for another kind of file, for a curve whose
    tokens are not known, and for a file that cannot be written.
    """
    if file.suffix[1:].lower() not in PICTURES:
        raise InputError(
            f"{file.suffix or 'no suffix'} is no picture of ours",
            where=str(file),
            hint=f"name it {file.stem}.png or {file.stem}.svg",
        )
    lines = [_line(curve, _end(curves)) for curve in curves]
    figures = require("matplotlib.figure", "search", "a picture")
    figure = figures.Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for curve, (x, y) in zip(curves, lines, strict=True):
        axes.step([at - 0.5 for at in x], y, where="post", label=curve.name)
    axes.set(xlabel="decoder layer", ylabel="vision tokens kept", ylim=(0, 1.03))
    axes.margins(x=0)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(file, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise InputError(
            f"cannot write the picture: {error.strerror or error}",
            where=str(file),
            hint="check --picture",
        ) from None


def _end(curves: Sequence[Curve]) -> int:
    """One layer past the last; where nothing says how many there are, a little past the cuts."""
    known = [curve.steps.layers for curve in curves if curve.steps.layers is not None]
    spare = 1 if known else 2
    return max([*known, *(c.steps.cuts[-1][0] + spare for c in curves if c.steps.cuts), spare])


def _line(curve: Curve, end: int) -> tuple[list[int], list[float]]:
    """Corners of a step curve."""
    x, y = [], []
    for first, amount in curve.steps.runs():
        share = curve.steps.share(amount)
        if share is None:
            raise InputError(
                f"{amount} tokens of how many?",
                where=curve.name,
                hint="give --tokens or --model",
            )
        x.append(first)
        y.append(float(share))
    return [*x, max(curve.steps.layers or end, x[-1])], [*y, y[-1]]
