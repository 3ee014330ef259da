"""``vtr search``: from a calibration set to a schedule."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vtr_export.cli.export import Dtype
from vtr_export.cli.output import PLAIN, Json
from vtr_export.cli.searching import RANKED, choose_vtw, run_search, show_ranks
from vtr_export.errors import InputError

if TYPE_CHECKING:
    from vtr_export.search.session import Setup

HERE: Final = "here"  # what --ray without an address means

app = typer.Typer(
    name="search", help="Find the schedule for a model: G-Search and P-Sigmoid.", **PLAIN
)


class Spend(StrEnum):
    """When the tolerance may be used up."""

    EVEN = "even"
    FIRST = "first"


Model = Annotated[str, typer.Option("--model", "-m", help="Checkpoint folder or cached hub id.")]
Calibration = Annotated[
    Path,
    typer.Option("--calibration", "-c", help="JSONL of image, question, answers; or its folder."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the schedule (YAML) goes.")]
Metric = Annotated[
    str, typer.Option(help="exact, vqa, relaxed, contains, agreement (no labels needed) or kl.")
]
Limit = Annotated[int | None, typer.Option(help="Draw so many questions, by --seed.")]
Seed = Annotated[int, typer.Option(help="Of the draw, and of P-Sigmoid's trials.")]
LedgerFile = Annotated[
    Path | None, typer.Option(help="What is known so far; default: OUT with .ledger.")
]
Evaluation = Annotated[
    Path | None, typer.Option(help="Other questions: measure the result on them, with intervals.")
]
ScoreOption = Annotated[
    str,
    typer.Option(help="auto: the best of eight; or previous|next/text|last/mean|max."),
]
Ranks = Annotated[bool, typer.Option("--ranks", help="Compare how the layers rank tokens.")]
ReportFile = Annotated[
    Path | None, typer.Option("--report", help="Default: report.html beside OUT.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of weights and activations.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Of an answer, at most.")]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="[ADDRESS]",
        help="Workers here; or on a cluster: auto, HOST:6379, ray://HOST:10001.",
    ),
]
Workers = Annotated[int | None, typer.Option(help="On Ray; default: one a GPU or four cores.")]


def spell_out(arguments: list[str]) -> list[str]:
    """``--ray`` alone with its value written out: typer's options have one or none."""
    followed = zip(arguments, [*arguments[1:], "-"], strict=True)
    bare = {i for i, (one, after) in enumerate(followed) if one == "--ray" and after[:1] == "-"}
    return [f"--ray={HERE}" if i in bare else one for i, one in enumerate(arguments)]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    ranks: Ranks = False,
    model: Annotated[str | None, typer.Option("--model", "-m", help="With --ranks.")] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", "-c", help="With --ranks.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="With --ranks: a page with the picture (HTML).")
    ] = None,
    score: Annotated[str, typer.Option(help="With --ranks: text|last/mean|max.")] = "text/mean",
    limit: Annotated[int, typer.Option(help="With --ranks: questions.")] = RANKED,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find the schedule for a model."""
    if context.invoked_subcommand is not None:
        return
    if not ranks:
        typer.echo(context.get_help())
        return
    if model is None or calibration is None:
        raise InputError(
            "--ranks compares the layers of a model on questions",
            hint="give --model and --calibration",
        )
    show_ranks(model, calibration, picture, score, limit, device, as_json)


@app.command()
def gsearch(
    model: Model,
    calibration: Calibration,
    out: Out,
    metric: Metric = "exact",
    tolerance: Annotated[
        float, typer.Option(help="How far the metric may fall: 0.002 is 0.2 points.")
    ] = 0.002,
    spend: Annotated[
        Spend,
        typer.Option(help="even: a part of the tolerance a layer; first: all from layer 1 on."),
    ] = Spend.EVEN,
    step: Annotated[int, typer.Option(help="Keeps tried are multiples of this.")] = 1,
    first_layer: Annotated[
        str, typer.Option(help="No cut before earlier layers; 1,2,3 tries each.")
    ] = "1",
    score: ScoreOption = "auto",
    limit: Limit = None,
    seed: Seed = 0,
    ledger: LedgerFile = None,
    evaluation: Evaluation = None,
    ranks: Ranks = False,
    page: ReportFile = None,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FP32,
    max_new_tokens: NewTokens = 16,
    ray: Ray = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """The fewest tokens at each layer without loss, shallow to deep."""
    from vtr_export.search.methods import GSearch

    options = GSearch(tolerance, spend.value, step, _numbers(first_layer))
    setup = _setup(locals())
    run_search(setup, options, out, score, ranks, page, as_json)


@app.command()
def psigmoid(
    model: Model,
    calibration: Calibration,
    out: Out,
    budget: Annotated[
        str, typer.Option(help="flops=0.4, tokens=0.125, latency=0.5@onnxruntime-cpu or 12ms@….")
    ],
    metric: Metric = "exact",
    trials: Annotated[int, typer.Option(help="Curves that are measured.")] = 40,
    batch: Annotated[int, typer.Option(help="Curves proposed at once.")] = 4,
    storage: Annotated[
        str | None, typer.Option(help="Optuna study: sqlite:///study.db, postgresql://HOST/DB.")
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="Measure FastV, PyramidDrop and others at the same budget.")
    ] = True,
    score: ScoreOption = "auto",
    limit: Limit = None,
    seed: Seed = 0,
    ledger: LedgerFile = None,
    evaluation: Evaluation = None,
    ranks: Ranks = False,
    page: ReportFile = None,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FP32,
    max_new_tokens: NewTokens = 16,
    ray: Ray = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """The best sigmoid of keeps under a budget, by Bayesian optimisation."""
    from vtr_export.search.budget import parse_budget
    from vtr_export.search.methods import PSigmoid

    options = PSigmoid(parse_budget(budget), trials, batch, storage, compare)
    setup = _setup(locals())
    run_search(setup, options, out, score, ranks, page, as_json)


@app.command()
def vtw(
    model: Model,
    calibration: Calibration,
    out: Out,
    eta: Annotated[
        float, typer.Option(help="Most mean KL in nats; published: 0.003 for 7B.")
    ] = 0.003,
    first_layer: Annotated[int, typer.Option(help="Layers before it are not tried.")] = 5,
    limit: Annotated[int, typer.Option(help="Questions, drawn by --seed.")] = 20,
    seed: Seed = 0,
    ledger: LedgerFile = None,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FP32,
    max_new_tokens: NewTokens = 16,
    as_json: Json = False,
) -> None:
    """VTW's rule: the layer from which on the image is no longer needed (needs no labels)."""
    given = locals() | {"metric": "kl", "evaluation": None, "ray": None, "workers": None}
    choose_vtw(_setup(given), out, eta, first_layer, as_json)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise InputError(f"--first-layer {text!r} is no layer", hint="give 1, or 1,2,3") from None


def _setup(given: dict[str, Any]) -> "Setup":
    """What both methods are given alike."""
    from vtr_export.search.session import Setup

    out: Path = given["out"]
    if not out.parent.is_dir():
        raise InputError(
            "the schedule has no folder to go to", where=str(out), hint=f"mkdir {out.parent}"
        )
    ray = given["ray"]
    return Setup(
        model=given["model"],
        calibration=given["calibration"],
        ledger=given["ledger"] or out.with_name(f"{out.name}.ledger"),
        metric=given["metric"],
        limit=given["limit"],
        seed=given["seed"],
        evaluation=given["evaluation"],
        device=given["device"],
        dtype=given["dtype"].value,
        max_new_tokens=given["max_new_tokens"],
        on_ray=ray is not None,
        address=None if ray == HERE else ray,
        workers=given["workers"],
    )
