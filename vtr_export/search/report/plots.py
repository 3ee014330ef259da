"""The pictures of a search report: inline SVG that takes its colours from the page."""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from vtr_export.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vtr_export.search.evaluator import Floats
    from vtr_export.search.gsearch import Try
    from vtr_export.search.report.page import Curve, Point, SearchReport

# what these stand for is decided by the page's style sheet, light or dark
INK, SOFT, LINE, CARD = "#1d2733", "#64707d", "#dfe4ea", "#fefefe"
GOOD, BAD, START = "#0f7b6c", "#b3261e", "#c77c02"
OTHERS = ("#5666d6", "#b04a86", "#7d8a1f", "#3b87b5", "#8c6044", "#7b6b9c")
VARIABLES = {
    INK: "ink", SOFT: "soft", LINE: "line", CARD: "card", GOOD: "good", BAD: "bad", START: "start",
} | {colour: f"other-{i}" for i, colour in enumerate(OTHERS)}  # fmt: skip
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are names
    "axes.titlesize": "medium",
    "legend.fontsize": "medium",
    "axes.edgecolor": LINE,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": LINE,
    "lines.color": INK,
}
MARKERS = "osD^vPX"
Draw = Callable[["Figure", bool], None]


def plots(report: "SearchReport") -> dict[str, Markup]:
    """A picture for each part of the report that has data: for a wide page, and for a phone."""
    # inches of height beside the legend's, wide and narrow
    drawn: dict[str, tuple[Draw, float, float]] = {}
    if report.curves:
        drawn["curves"] = (lambda f, narrow: _curves(f, report, narrow), 2.7, 2.9)
    if report.points:
        drawn["points"] = (lambda f, narrow: _points(f, report, narrow), 2.7, 4.6)
    if report.tries:
        drawn["tries"] = (lambda f, narrow: _tries(f, report, narrow), 4.0, 4.3)
    if report.ranks:
        drawn["ranks"] = (lambda f, narrow: _ranks(f, report, narrow), 3.3, 6.0)
    return {name: _both(name, *each) for name, each in drawn.items()}


def _both(name: str, draw: Draw, wide: float, narrow: float) -> Markup:
    whole = _svg(f"{name}-wide", draw, (7.6, wide), False)
    phone = _svg(f"{name}-narrow", draw, (3.6, narrow), True)
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(whole, phone)


def _svg(name: str, draw: Draw, inches: tuple[float, float], narrow: bool) -> Markup:
    """Without prolog, namespaces and size; ids are unique on the page."""
    matplotlib = require("matplotlib", "search", "the report")
    figures = require("matplotlib.figure", "search", "the report")
    out = io.StringIO()
    style = STYLE | {"svg.hashsalt": name, "font.size": 9 if narrow else 8}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's fonts may have it
        figure = figures.Figure(figsize=inches, layout="constrained")
        draw(figure, narrow)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = text.replace("xlink:href=", "href=")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return Markup(text)


def _curves(figure: "Figure", report: "SearchReport", narrow: bool) -> None:
    axes = figure.subplots()
    _plain(axes, f"{report.unit} entering each decoder layer")
    for curve, style in zip(report.curves, _styles(report.curves), strict=True):
        edges = range(len(curve.keeps) + 1)
        if curve.role == "result":
            axes.stairs(curve.keeps, edges, fill=True, color=GOOD, alpha=0.16)
        axes.stairs(curve.keeps, edges, baseline=None, label=curve.name, **style)
    layers = max(len(curve.keeps) for curve in report.curves)
    axes.set_xlim(0, layers)
    axes.set_yscale("function", functions=(lambda keep: np.sqrt(np.maximum(keep, 0)), np.square))
    axes.set_ylim(0, 1.06 * report.parts)
    ticks = sorted({0, *(report.parts // share for share in (16, 4, 2, 1))})
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    _layer_axis(axes, layers, narrow, offset=0.5)
    _legend(figure, [axes], narrow)


def _points(figure: "Figure", report: "SearchReport", narrow: bool) -> None:
    """All; and around the Pareto front where that is a small part."""
    front = pareto_front(report.points)
    focus = [one.metric for one in (*front, *report.points) if one.role == "result" or one in front]
    low, high = min(focus), max(focus)
    lowest = min(point.metric for point in report.points)
    if high - low > 0.5 * (high - lowest):
        panels = [figure.subplots()]
    else:
        panels = list(figure.subplots(2, 1) if narrow else figure.subplots(1, 2))
    for axes in panels:
        _plain(axes, f"{report.label}, {_unit(report)}")
        _scatter(axes, report, front)
        axes.set_xlabel("decoder FLOPs, % of the unpruned model")
    if len(panels) > 1:
        _plain(panels[1], "the same around the Pareto front")
        scale, slack = (
            100 if report.is_share else 1,
            0.15 * (high - low) or 0.05 * (high - lowest) or 0.01,
        )
        panels[1].set_ylim(scale * (low - slack), scale * (high + slack))
        left, right = 100 * front[0].flops, 100 * max(each.flops for each in front)
        panels[1].set_xlim(left - 2, max(right, left + 5) + 2)
    _legend(figure, panels[:1], narrow)


def _scatter(axes: "Axes", report: "SearchReport", front: "list[Point]") -> None:
    scale = 100 if report.is_share else 1
    measured = [point for point in report.points if point.role == "measured"]
    if measured:
        x, y = [100 * each.flops for each in measured], [scale * each.metric for each in measured]
        axes.scatter(x, y, s=13, color=SOFT, alpha=0.55, linewidths=0, label="measured")
    axes.step(
        [100 * each.flops for each in front], [scale * each.metric for each in front],
        where="post", color=SOFT, linewidth=0.9, linestyle=":", label="Pareto front",
    )  # fmt: skip
    named = [point for point in report.points if point.role != "measured"]
    for i, (point, style) in enumerate(zip(named, _styles(named), strict=True)):
        share, colour, is_result = 100 * point.flops, style["color"], point.role == "result"
        if point.interval:
            low, high = point.interval
            axes.vlines(share, scale * low, scale * high, color=colour, linewidth=1)
        axes.plot(
            [share], [scale * point.metric], linestyle="none", label=point.name,
            marker="*" if is_result else MARKERS[i % len(MARKERS)], color=colour,
            markersize=12 if is_result else 6.5, zorder=4 if is_result else 3,
            markeredgecolor=CARD, markeredgewidth=0.6,
        )  # fmt: skip
    axes.margins(x=0.04, y=0.08)


def pareto_front(points: "Sequence[Point]") -> "list[Point]":
    """Points that no cheaper one equals, cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.flops, -each.metric)):
        if not front or point.metric > front[-1].metric:
            front.append(point)
    return front


def verdict(one: "Try") -> str:
    """Passed, failed after all questions, or abandoned before."""
    if one.passed:
        return "passed"
    return "abandoned" if one.metric is None else "failed"


_VERDICTS: dict[str, dict[str, Any]] = {
    "passed": {"marker": "o", "facecolor": GOOD, "edgecolor": GOOD, "zorder": 3},
    "failed": {"marker": "X", "facecolor": BAD, "edgecolor": BAD},
    "abandoned": {"marker": "X", "facecolor": "none", "edgecolor": BAD},
}


def _tries(figure: "Figure", report: "SearchReport", narrow: bool) -> None:
    """Above, the keeps tried at each layer, in order; below, the metric they gave."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _plain(above, f"{report.unit} tried from each decoder layer on")
    _plain(below, f"{report.label} of those asked all questions, {_unit(report)}")
    layers, scale = report.tries_by_layer, 100 if report.is_share else 1
    size = 10 if len(report.tries) > 100 else 24
    for layer, tries in layers.items():
        x = [layer + place for place in _spread(len(tries))]
        above.plot(x, [one.keep for one in tries], color=LINE, linewidth=1.2, zorder=1)
    for name, style in _VERDICTS.items():
        look = {"s": size, "linewidths": 0.9, "zorder": 2} | style
        shown = [(x, one) for x, one in _places(layers) if verdict(one) == name]
        whole = [(x, one.metric) for x, one in shown if one.metric is not None]
        if shown:
            above.scatter([x for x, _ in shown], [one.keep for _, one in shown], label=name, **look)
        below.scatter([x for x, _ in whole], [scale * metric for _, metric in whole], **look)
    if report.floors:
        ends = [layer - 0.5 for layer in report.floors], [layer + 0.5 for layer in report.floors]
        style = {"color": SOFT, "linewidth": 0.9, "linestyle": "--"}
        least = [scale * floor for floor in report.floors.values()]
        below.hlines(least, *ends, label="least that passes", **style)
    below.margins(y=0.15)
    _keep_axis(above, report.parts)
    _layer_axis(below, max(layers) + 1, narrow)
    below.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
    _legend(figure, [above, below], narrow)


def _places(layers: "dict[int, list[Try]]") -> "list[tuple[float, Try]]":
    """Every try with its place on the layers' axis: in its layer's column, in order."""
    return [
        (layer + place, one)
        for layer, tries in layers.items()
        for place, one in zip(_spread(len(tries)), tries, strict=True)
    ]


def _keep_axis(axes: "Axes", parts: int) -> None:
    """Logarithmic but for the least keeps: halvings are equally far."""
    least = max(1, parts / 32)
    axes.set_yscale("symlog", base=2, linthresh=least, linscale=0.6)
    halves = [parts // 2**i for i in range(6)]
    ticks = [0, *sorted({half for half in halves if half >= least})]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(-0.15 * least, 1.15 * parts)


def _spread(count: int) -> list[float]:
    """Places of a layer's trials within its column."""
    return [0.7 * ((i + 0.5) / count - 0.5) for i in range(count)]


def _ranks(figure: "Figure", report: "SearchReport", narrow: bool) -> None:
    assert report.ranks is not None
    found = report.ranks
    target = report.result.tokens if report.result and report.result.tokens else 0.0
    overlap = min(found.overlaps, key=lambda each: abs(each.share - target))
    places = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    small = found.layers <= (10 if narrow else 14)
    tau = _heat(places[0], found.tau, (-1, 1), "RdBu", small)
    figure.colorbar(tau, ax=places[0], shrink=0.85).outline.set_visible(False)
    places[0].set_title("Kendall's tau, mean over the questions", loc="left")
    shared = _heat(places[1], 100 * overlap.mean, (0, 100), "viridis", small, 0)
    figure.colorbar(shared, ax=places[1], shrink=0.85).outline.set_visible(False)
    taken = f"{100 * overlap.share:.3g} %"
    places[1].set_title(f"shared of the best {taken} of tokens, %", loc="left")


def _heat(
    axes: "Axes", values: "Floats", reach: tuple[float, float], colours: str, annotate: bool,
    digits: int = 2,
) -> Any:  # fmt: skip
    mesh = axes.pcolormesh(
        values, vmin=reach[0], vmax=reach[1], cmap=colours, edgecolors="face", linewidth=0.2
    )
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    step = 1 if len(values) <= 16 else 4
    ticks = range(0, len(values), step)
    axes.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    axes.set_yticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    axes.set_xlabel("decoder layer")
    for (row, column), value in _entries(values) if annotate else ():
        red, green, blue, _ = mesh.to_rgba(np.array([value]))[0]
        is_light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
        axes.text(
            column + 0.5, row + 0.5, _spelt(value, digits),
            ha="center", va="center", fontsize="small" if len(values) <= 8 else "x-small",
            color="#101010" if is_light else "#f8f8f8",
        )  # fmt: skip
    return mesh


def _spelt(value: float, digits: int) -> str:
    """Short: a cell is small."""
    text = f"{abs(value):.{digits}f}"
    if not float(text):
        return "0"
    return ("\N{MINUS SIGN}" if value < 0 else "") + (text.lstrip("0") if digits else text)


def _entries(values: "Floats") -> list[tuple[tuple[int, int], float]]:
    """Known entries off the diagonal."""
    rows = range(len(values))
    pairs = [(i, j) for i in rows for j in rows if i != j]
    return [(pair, float(values[pair])) for pair in pairs if values[pair] == values[pair]]


def _styles(items: "list[Point] | tuple[Curve, ...]") -> list[dict[str, Any]]:
    """Each its colour and line: what was found stands out."""
    styles: list[dict[str, Any]] = []
    others = 0
    for item in items:
        if item.role == "result":
            styles.append({"color": GOOD, "linewidth": 2.2, "zorder": 3})
        elif item.role in ("start", "unpruned"):
            colour = START if item.role == "start" else INK
            styles.append({"color": colour, "linewidth": 1.5, "linestyle": "--"})
        else:
            lines = ("-", "--", ":")[others // len(OTHERS) % 3]
            colour = OTHERS[others % len(OTHERS)]
            styles.append({"color": colour, "linewidth": 1.2, "linestyle": lines})
            others += 1
    return styles


def _plain(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)


def _layer_axis(axes: "Axes", layers: int, narrow: bool, offset: float = 0.0) -> None:
    step = next(step for step in (1, 2, 4, 8, 16, 32) if layers / step <= (12 if narrow else 24))
    ticks = range(0, layers, step)
    axes.set_xticks([tick + offset for tick in ticks], [str(tick) for tick in ticks])
    axes.set_xlabel("decoder layer")


def _legend(figure: "Figure", panels: "list[Axes]", narrow: bool) -> None:
    found = [panel.get_legend_handles_labels() for panel in panels]
    handles = [handle for own, _ in found for handle in own]
    names = [_short(name, 22 if narrow else 36) for _, own in found for name in own]
    if len(names) > 1:
        fits = (56 if narrow else 110) // (max(map(len, names)) + 6)  # characters of a line
        columns = max(1, min(fits, 4))
        rows = -(-len(names) // columns)
        figure.set_figheight(figure.get_figheight() + 0.17 * rows)
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def _unit(report: "SearchReport") -> str:
    return "%" if report.is_share else "nats"
