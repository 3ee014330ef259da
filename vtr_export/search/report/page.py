"""A search as one offline HTML file: what was found, and everything it was chosen from."""

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import jinja2
from PIL import Image

from vtr_export.runtime.show_kept import Grid, darken
from vtr_export.search.comparison import Row
from vtr_export.search.gsearch import Try, Violation
from vtr_export.search.psigmoid import Tuned
from vtr_export.search.questions.statistics import Difference
from vtr_export.search.ranks import Ranks
from vtr_export.search.report.plots import plots, verdict
from vtr_export.search.text_file import write_text

Interval = tuple[float, float]  # 95 %
Role = Literal["result", "start", "comparison", "measured", "unpruned"]

LEAST_WIDTH = 192  # pixels of an image that is shown
SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit


@dataclass(frozen=True)
class Result:
    """The schedule found, on ``questions`` questions. Shares are 0 to 1."""

    metric: float
    unpruned: float
    questions: int
    difference: Difference | None = None  # to the unpruned model
    tokens: float | None = None  # mean over the decoder layers, of the vision tokens
    flops: float | None = None  # decoder prefill, of the unpruned model's
    measured_on: str = ""  # the questions' name, where they are not the calibration set


@dataclass(frozen=True)
class Effort:
    """What the search cost."""

    evaluations: int
    decoder_flops_spent: int
    decoder_flops_naive: int
    reused: int = 0  # evaluations that the ledger answered
    seconds: float | None = None
    resumed: bool = False


@dataclass(frozen=True)
class Curve:
    """Keeps of every decoder layer, in the report's parts; a candidate's ``keeps``."""

    name: str
    keeps: tuple[int, ...]
    role: Role = "comparison"


@dataclass(frozen=True)
class Point:
    """A schedule measured whole. ``flops`` as in :class:`Result`."""

    name: str
    flops: float
    metric: float
    role: Role = "measured"
    interval: Interval | None = None  # of the metric


@dataclass(frozen=True)
class ScoreTrial:
    """A score that was tried, all else equal. ``kl`` in nats."""

    score: str
    metric: float
    kl: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Compared:
    """A schedule at the same budget; without a metric, ``note`` says why it is missing."""

    name: str
    metric: float | None
    note: str = ""
    difference: Difference | None = None  # as ``SearchReport.compared_as`` says
    cost: float | None = None  # what the budget bounds, of the unpruned model's
    tokens: float | None = None
    role: Role = "comparison"

    @classmethod
    def of(
        cls, row: Row, difference: Difference | None = None, role: Role = "comparison"
    ) -> "Compared":
        """As it was measured."""
        tokens = row.candidate.mean_keep if row.candidate else None
        return cls(row.name, row.metric, row.note, difference, row.cost, tokens, role)


@dataclass(frozen=True)
class KeptImage:
    """An example: the model's view, and the tokens left from each cut on.

    ``stages`` maps the layer a cut stands before to the numbers of the image's tokens.
    """

    view: Image.Image
    grid: Grid
    stages: Mapping[int, tuple[int, ...]]
    question: str
    answer: str
    unpruned_answer: str


@dataclass(frozen=True)
class SearchReport:
    """Everything the page shows; what is empty is left out.

    ``parts`` is what keeps count: an image's vision tokens, or with ``varies`` hundredths of
    them. ``metric`` is a name of :mod:`vtr_export.search.questions.metrics`.
    """

    title: str
    metric: str
    parts: int
    varies: bool = False
    notes: tuple[str, ...] = ()  # warnings
    result: Result | None = None
    effort: Effort | None = None
    curves: tuple[Curve, ...] = ()
    points: tuple[Point, ...] = ()
    tries: tuple[Try, ...] = ()
    floor: float | Callable[[int], float] | None = None  # least metric that passes, at each layer
    violations: tuple[Violation, ...] = ()
    scores: tuple[ScoreTrial, ...] = ()
    tuned: Tuned | None = None
    budget: str = ""  # as the user spelt it
    compared: tuple[Compared, ...] = ()
    compared_as: str = "less unpruned"  # heads the differences
    ranks: Ranks | None = None
    kept: tuple[KeptImage, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    schedule: str = ""  # YAML

    @property
    def unit(self) -> str:
        """What a keep counts."""
        return "% of the vision tokens" if self.varies else "vision tokens"

    @property
    def label(self) -> str:
        """The metric's name, as people read it."""
        return self.metric if self.is_share else "\N{MINUS SIGN}KL"

    @property
    def is_share(self) -> bool:
        """Whether the metric is a share of 1; else it is minus nats."""
        return self.metric != "kl"

    @property
    def tries_by_layer(self) -> dict[int, list[Try]]:
        """Tries of each layer, in order."""
        layers: dict[int, list[Try]] = {}
        for one in self.tries:
            layers.setdefault(one.layer, []).append(one)
        return dict(sorted(layers.items()))

    @property
    def floors(self) -> dict[int, float]:
        """The least metric that passes at each layer that was tried."""
        if self.floor is None:
            return {}
        floor = self.floor
        return {one: floor(one) if callable(floor) else floor for one in self.tries_by_layer}


def write(report: SearchReport, path: Path) -> None:
    """Write the page: old or new, never a part. InputError where the file cannot be written."""
    write_text(path, page(report), "the report")


def page(report: SearchReport) -> str:
    """The report as HTML that needs nothing else."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vtr_export", "search/report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "metric": partial(_metric, report.is_share),
        "difference": partial(_difference, report.is_share),
        "interval": partial(_interval, report.is_share),
        "share": _share,
        "tau": partial(_signed, digits=2),
        "flops": _flops,
        "duration": _duration,
        "kl": lambda value: f"{_signed(value, 4)}{SPACE}nats",
        "figure": _figure,
        "picture": _picture,
        "verdict": verdict,
    }
    return environment.get_template("page.html.j2").render(report=report, plots=plots(report))


def _metric(is_share: bool, value: float) -> str:
    return f"{100 * value:.2f}{SPACE}%" if is_share else f"{_signed(value, 4)}{SPACE}nats"


def _difference(is_share: bool, value: float) -> str:
    if is_share:
        return f"{_signed(100 * value, 2, plus=True)}{SPACE}points"
    return f"{_signed(value, 4, plus=True)}{SPACE}nats"


def _interval(is_share: bool, difference: Difference) -> str:
    low = _difference(is_share, difference.low).partition(SPACE)[0]
    return f"{low} to {_difference(is_share, difference.high)}"


def _signed(value: float, digits: int, *, plus: bool = False) -> str:
    """With a true minus sign; what rounds to zero has none."""
    text = f"{abs(value):.{digits}f}"
    if not float(text):
        return text
    sign = "\N{MINUS SIGN}" if value < 0 else "+" if plus else ""
    return sign + text


def _figure(value: float) -> str:
    """A parameter, to three digits; less than 0.0001 is none."""
    text = f"{round(abs(value), 4):.3g}"
    return ("\N{MINUS SIGN}" if value < 0 and float(text) else "") + text


def _share(value: float) -> str:
    return f"{100 * value:.1f}{SPACE}%"


def _flops(count: float) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if count < 999.5:
            return f"{count:.3g}{SPACE}{prefix}FLOPs"
        count /= 1000
    return f"{count:.3g}{SPACE}EFLOPs"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f}{SPACE}s"
    minutes = round(seconds / 60)
    hours = f"{minutes // 60}{SPACE}h " if minutes >= 120 else ""
    return f"{hours}{minutes % 60 if hours else minutes}{SPACE}min"


def _picture(image: KeptImage, kept: tuple[int, ...] | None = None) -> str:
    """The view as a data URI, patches whose tokens are gone darkened."""
    scale = max(1, -(-LEAST_WIDTH // image.view.width))
    everything = range(image.grid.leading + image.grid.rows * image.grid.columns)
    shown = darken(
        image.view.convert("RGB"), image.grid, everything if kept is None else kept, scale
    )
    out = io.BytesIO()
    shown.save(out, format="JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
