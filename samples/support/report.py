"""An acceptance as a page: one HTML file that needs nothing else.

python samples/support/report.py report.json report.html
"""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
INK, SOFT, LINE, WHOLE, CUT = "#1d2733", "#64707d", "#dfe4ea", "#b8c2cd", "#0f7b6c"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "vtr", "font.size": 10}
Found = dict[str, Any]


def page(found: Found) -> str:
    """The report of an acceptance, as ``report.json`` holds it."""
    loader = FileSystemLoader(HERE)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"size": size, "number": number, "minutes": minutes}
    plots = {dtype: plot(run) for dtype, run in found["runs"].items() if run["export"]}
    return environment.get_template("report.html.j2").render(**found, plots=plots)


def plot(run: Found) -> str:
    """Tokens by layer; beside them, where something was timed, milliseconds with and without."""
    from matplotlib import rc_context

    timed, keeps = run["times"], run["export"]["vision_tokens_per_layer"]
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 2.7), layout="constrained")
        left, *others = figure.subplots(
            1, 3 if timed else 1, width_ratios=[2, 1, 1][: 3 if timed else 1], squeeze=False
        )[0]
        _tokens(left, keeps)
        for axes, name in zip(others, ("prefill", "decode"), strict=False):
            _bars(axes, name, timed[f"{name}_ms_unpruned"], timed[f"{name}_ms"])
        return _svg(figure)


def _tokens(axes: Axes, keeps: list[int] | None) -> None:
    _plain(axes, "vision tokens by layer")
    if keeps is None:
        axes.text(0.5, 0.5, "vary with the image", ha="center", transform=axes.transAxes)
        return
    edges = range(len(keeps) + 1)
    axes.stairs([max(keeps)] * len(keeps), edges, fill=True, color=WHOLE, alpha=0.45)
    axes.stairs(keeps, edges, fill=True, color=CUT)
    axes.set_xlim(0, len(keeps))
    axes.set_xlabel("decoder layer", color=SOFT)


def _bars(axes: Axes, name: str, whole: float, cut: float) -> None:
    _plain(axes, f"{name}, ms")
    bars = axes.bar(["unpruned", "pruned"], [whole, cut], color=[WHOLE, CUT], width=0.62)
    axes.bar_label(bars, fmt="%.3g", padding=2, color=INK)
    axes.set_ylim(0, 1.18 * max(whole, cut))
    axes.set_yticks([])


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(colors=SOFT, length=0)


def _svg(figure: Figure) -> str:
    """Inline: no prolog, no date, no size but the box's."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    svg = text[text.index("<svg") :]
    return re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", svg, count=1)


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return ""


def number(value: float | None) -> str:
    """Short, and never as a power where none is needed."""
    return "" if value is None else f"{value:.7g}"


def minutes(seconds: float) -> str:
    """Seconds, or minutes where there are many."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(page(json.loads(source.read_text(encoding="utf-8"))), encoding="utf-8")
