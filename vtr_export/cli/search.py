"""``vtr search``: from a calibration set to a schedule."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from vtr_export.cli.export import Dtype
from vtr_export.cli.output import PLAIN, Json, Progress, columns, progress, report, runs, warn
from vtr_export.errors import InputError

if TYPE_CHECKING:
    from vtr_export.search.candidate import Score
    from vtr_export.search.methods import Result, Search
    from vtr_export.search.runner import Progress as Measuring
    from vtr_export.search.session import Session, Setup

INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it
HERE: Final = "here"  # what --ray without an address means
RANKED: Final = 64  # questions whose layers are compared

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
ReportFile = Annotated[Path | None, typer.Option(help="Default: report.html beside OUT.")]
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
    _show_ranks(model, calibration, picture, score, limit, device, as_json)


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
    score: ScoreOption = "auto",
    limit: Limit = None,
    seed: Seed = 0,
    ledger: LedgerFile = None,
    evaluation: Evaluation = None,
    ranks: Ranks = False,
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Default: report.html beside OUT.")
    ] = None,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FP32,
    max_new_tokens: NewTokens = 16,
    ray: Ray = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """The fewest tokens at each layer without loss, shallow to deep."""
    from vtr_export.search.methods import GSearch

    options = GSearch(tolerance, spend.value, step)
    setup = _setup(locals())
    _run(setup, out, score, ranks, report_file, as_json, lambda search: search.gsearch(options))


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
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Default: report.html beside OUT.")
    ] = None,
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
    _run(setup, out, score, ranks, report_file, as_json, lambda search: search.psigmoid(options))


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


def _run(
    setup: "Setup",
    out: Path,
    score: str,
    ranks: bool,
    page: Path | None,
    as_json: bool,
    find: "Callable[[Search], Result]",
) -> None:
    from vtr_export.search import summary
    from vtr_export.search.methods import Search
    from vtr_export.search.session import Session

    with progress() as announce, _terminable():
        watch = _Watch(announce)
        try:
            with Session(setup, say=watch.say, progress=watch.measuring) as session:
                search = Search(session, _scores(score, session), watch.say)
                try:
                    find(search)
                except KeyboardInterrupt:
                    _give_up(search, out)
                text = _write_schedule(search, out)
                announce("writing the report")
                _write_report(search, text, page or out.with_name("report.html"), ranks)
        except KeyboardInterrupt:
            _give_up(None, out)
    warn(session.warnings)
    report(summary.to_json(search, str(out), session.warnings), _lines(search, out), as_json)


class _Watch:
    """Steps on lines; how far the step under way is, for those who watch."""

    def __init__(self, announce: Progress) -> None:
        self.announce, self.say = announce, announce

    def measuring(self, at: "Measuring") -> None:
        """A result came in."""
        so_far = "" if at.metric is None else f", {at.metric:.4f} so far"
        left = "" if at.eta_s is None else f", about {_minutes(at.eta_s)} left"
        keeps = runs(at.candidate.keeps)
        self.announce.detail(f"{keeps}: {at.done} of {at.total} questions{so_far}{left}")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM leaves as Ctrl-C does: with what was found so far."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _give_up(search: "Search | None", out: Path) -> NoReturn:
    """Write the best so far, and say how to go on."""
    typer.echo("interrupted; the same command goes on from here", err=True)
    if search is not None and not search.result.candidate.is_unpruned:
        _write_schedule(search, out)
        typer.echo(f"wrote the best so far: {out}", err=True)
    raise SystemExit(INTERRUPTED) from None


def _scores(text: str, session: "Session") -> "tuple[Score, ...]":
    from vtr_export.search.candidate import SCORES

    if text == "auto":
        return session.space.scores
    found = tuple(one for one in SCORES if "/".join(one.to_data().values()) == text)
    if not found or found[0] not in session.space.scores:
        names = ", ".join("/".join(one.to_data().values()) for one in session.space.scores)
        raise InputError(f"no score {text!r}", hint=f"auto, or one of: {names}")
    return found


def _write_schedule(search: "Search", out: Path) -> str:
    """The YAML, written whole or not at all."""
    schedule = search.result.candidate.schedule(search.session.facts, search.origin())
    text, staged = schedule.dump(), out.with_name(f".{out.name}.tmp")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(out)
    except OSError as error:
        raise InputError(
            f"cannot write the schedule: {error.strerror}", where=str(out), hint="check --out"
        ) from None
    return text


def _write_report(search: "Search", schedule: str, page: Path, ranks: bool) -> None:
    from vtr_export.search.examples import examples
    from vtr_export.search.ranks import model_ranks
    from vtr_export.search.report import write
    from vtr_export.search.summary import to_report

    model = search.session.model()
    questions, candidate = search.session.calibration.questions, search.result.candidate
    ranked = model_ranks(model, questions[:RANKED], candidate.score) if ranks else None
    new = search.session.setup.max_new_tokens
    kept = examples(model, candidate, questions, max_new_tokens=new)
    write(to_report(search, schedule, ranked, kept), page)


def _lines(search: "Search", out: Path) -> Iterator[str]:
    from vtr_export.search.summary import flops_share

    session, result = search.session, search.result
    runner, measured = session.runner, result.measured
    yield f"wrote {out}"
    yield f"vision tokens per layer: {runs(result.candidate.keeps)} of {result.candidate.parts}"
    yield f"score: {result.candidate.score}"
    share = flops_share(session, result.candidate)
    tokens = result.candidate.mean_keep
    yield f"decoder prefill: {share:.3f} of the FLOPs, {tokens:.3f} of the tokens"
    if measured is not None and measured.metric is not None:
        whole = session.unpruned.metric
        yield f"{session.metric.name}: {measured.metric:.4f}, unpruned {whole:.4f}"
    if (held := result.held_out) is not None:
        yield f"held out: {held.metric:.4f}, unpruned {held.unpruned:.4f}: {held.difference}"
        yield from (
            f"held out, {rival.name}: {rival.metric:.4f}; ours {rival.difference}"
            for rival in held.rivals
        )
    if result.compared:
        head = ("at the same budget", session.metric.name, "KL", "cost")
        rows = [
            (r.name, _number(r.metric), _number(r.kl), _number(r.cost)) for r in result.compared
        ]
        yield from columns([head, *rows])
    for one in result.found.violations() if result.found else ():
        yield (
            f"layer {one.layer}: {one.fewer.keep} tokens did better than {one.more.keep}, "
            "against the search's assumption"
        )
    spent, naive = runner.decoder_flops_spent, runner.decoder_flops_naive
    yield (
        f"{runner.evaluations} candidates, {spent:.3g} decoder FLOPs: {spent / naive:.3f} of a "
        f"naive search's; {result.seconds:.0f} s"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _show_ranks(
    model: str,
    calibration: Path,
    page: Path | None,
    score: str,
    limit: int,
    device: str,
    as_json: bool,
) -> None:
    from vtr_export.checkpoint import find_folder
    from vtr_export.search.calibration import CalibrationSet
    from vtr_export.search.candidate import SCORES
    from vtr_export.search.ranks import model_ranks
    from vtr_export.search.report import SearchReport, write
    from vtr_export.search.torch_model import TorchModel

    chosen = [one for one in SCORES if f"{one.query}/{one.heads}" == score]
    if not chosen:
        raise InputError(f"no score {score!r}", hint="text/mean, text/max, last/mean or last/max")
    questions = CalibrationSet.load(calibration, limit=limit, labels=False).questions
    loaded = TorchModel(find_folder(model), device, "fp32")
    found = model_ranks(loaded, questions, chosen[0])
    if page is not None:
        parts = loaded.facts.tokens_per_image or 100
        title = f"Rankings of {find_folder(model).resolve().name}"
        write(SearchReport(title=title, metric="exact", parts=parts, ranks=found), page)
    report(found.to_json(), columns(found.table()), as_json)
