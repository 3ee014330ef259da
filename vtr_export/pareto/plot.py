"""The picture of a comparison: wrong answers against what they cost, and the Pareto fronts."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

from vtr_export.extras import require
from vtr_export.pareto.measured import Point, Report, front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: Final = {
    "none": "#1d2733",
    "vision": "#0f7b6c",
    "prefill": "#5666d6",
    "both": "#c77c02",
}
NAMES: Final = {
    "none": "unpruned",
    "vision": "before the decoder",
    "prefill": "inside the decoder",
    "both": "both",
}
MARKERS: Final = "os^Dv"
OWN: Final = "P"
PANELS: Final = (
    ("flops_ratio", "FLOPs: vision encoder, reduction and prefill, of the unpruned model's"),
    ("first_ratio", "time to the first token, of the unpruned model's"),
)


def draw(report: Report, file: Path) -> None:
    """An SVG; UnavailableError without matplotlib."""
    matplotlib = require("matplotlib", "search", "a picture")
    figures = require("matplotlib.figure", "search", "a picture")
    with matplotlib.rc_context({"svg.hashsalt": "methods", "font.size": 8}):
        figure = figures.Figure(figsize=(12, 6.4), layout="constrained")
        for axes, (cost, label) in zip(figure.subplots(1, 2, sharey=True), PANELS, strict=True):
            _panel(axes, report, cost, label)
        handles = _legend(report)
        figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // 2))
        figure.savefig(file, format="svg", metadata={"Date": None})


def _panel(axes: "Axes", report: Report, cost: str, label: str) -> None:
    """Every point, the front as steps, and the names of those on it."""
    for point in report.points:
        axes.plot(
            [getattr(point, cost)],
            [_wrong(point, report)],
            linestyle="none",
            marker=_marker(point, report),
            markersize=6,
            color=COLOURS[point.phase],
            alpha=0.75,
            markeredgewidth=0,
        )
    best = front(report.points, cost)
    x, y = [getattr(one, cost) for one in best], [_wrong(one, report) for one in best]
    axes.step(x, y, where="post", color="#64707d", linewidth=0.9, linestyle=":")
    for number, point in enumerate(best):
        axes.annotate(
            _name(point),
            (getattr(point, cost), _wrong(point, report)),
            xytext=(5, 4 + 9 * (number % 2)),
            textcoords="offset points",
            fontsize=7,
            color=COLOURS[point.phase],
        )
    axes.set_yscale("log")
    axes.set(xlabel=label, ylabel="wrong answers, %")
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    ticker = require("matplotlib.ticker", "search", "a picture")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(alpha=0.3)


def _wrong(point: Point, report: Report) -> float:
    """Per cent; none at all is drawn as half a question."""
    return 100 * max(1 - point.accuracy, 0.5 / report.questions)


def _name(point: Point) -> str:
    return point.method if point.asked is None else f"{point.method}, {100 * point.asked:.4g} %"


def _shares(report: Report) -> list[float]:
    return sorted({point.asked for point in report.points if point.asked is not None}, reverse=True)


def _marker(point: Point, report: Report) -> str:
    if point.asked is None:
        return OWN
    return MARKERS[_shares(report).index(point.asked) % len(MARKERS)]


def _legend(report: Report) -> list[object]:
    lines = require("matplotlib.lines", "search", "a picture")
    found = {point.phase for point in report.points}
    phases = [
        lines.Line2D([], [], color=colour, marker="o", linestyle="none", label=NAMES[phase])
        for phase, colour in COLOURS.items()
        if phase in found
    ]
    kinds = {f"{100 * share:.4g} % of the tokens": MARKERS[i % len(MARKERS)]
             for i, share in enumerate(_shares(report))}  # fmt: skip
    kinds["as the image or the schedule says"] = OWN
    shapes = [
        lines.Line2D([], [], color="#64707d", marker=mark, linestyle="none", label=label)
        for label, mark in kinds.items()
    ]
    return [*phases, *shapes]
