"""What ``vtr search`` does around a search: progress, interruption, files, the report's lines."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import typer

from vtr_export.cli.output import Progress, columns, progress, report, runs, warn
from vtr_export.errors import InputError
from vtr_export.extras import require

if TYPE_CHECKING:
    from vtr_export.search.candidate import Score
    from vtr_export.search.methods import Options, Search
    from vtr_export.search.runner import Progress as Measuring
    from vtr_export.search.session import Session, Setup

INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it
RANKED: Final = 64  # questions whose layers are compared


def run_search(
    setup: "Setup",
    options: "Options",
    out: Path,
    score: str,
    ranks: bool,
    page: Path | None,
    as_json: bool,
) -> None:
    """Search, write the schedule and the report; interrupted, leave the best so far."""
    from vtr_export.search import summary
    from vtr_export.search.methods import Search
    from vtr_export.search.session import Session

    for package in ("matplotlib", "scipy"):  # before a long search, not after it
        require(package, "search", "a search")
    with progress() as announce, _terminable():
        watch = _Watch(announce)
        session = Session(setup, say=watch.say, progress=watch.measuring)
        search = Search(session, _scores(score, session), options, watch.say)
        try:
            with session:
                search.run()
                text = _write_schedule(search, out)
                announce("writing the report")
                _write_report(search, text, page or out.with_name("report.html"), ranks)
        except KeyboardInterrupt:
            _give_up(search, out)
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


def _give_up(search: "Search", out: Path) -> NoReturn:
    """Write the best so far, and say how to go on."""
    typer.echo("interrupted; the same command goes on from here", err=True)
    if not search.result.candidate.is_unpruned:
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
    from vtr_export.search.text_file import write_text

    session = search.session
    model = _seen_from(out, session.setup.model) if session.is_checkpoint else None
    schedule = search.result.candidate.schedule(session.facts, search.origin(), model)
    text = schedule.dump()
    write_text(out, text, "the schedule")
    return text


def _seen_from(out: Path, model: str) -> str:
    """``model:`` as the schedule beside it must spell it; a hub id is one everywhere."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model
    relative = os.path.relpath(folder, out.parent)
    return relative if relative.startswith(".") else f"./{relative}"


def _write_report(search: "Search", schedule: str, page: Path, ranks: bool) -> None:
    from vtr_export.search.ranks import model_ranks
    from vtr_export.search.report.examples import examples
    from vtr_export.search.report.page import KeptImage, write
    from vtr_export.search.summary import to_report

    model, ranked = search.session.model(), None
    kept: tuple[KeptImage, ...] = ()
    questions, candidate = search.session.calibration.questions, search.result.candidate
    if model is not None:
        ranked = model_ranks(model, questions[:RANKED], candidate.score) if ranks else None
        new = search.session.setup.max_new_tokens
        kept = examples(model, candidate, questions, max_new_tokens=new)
    write(to_report(search, schedule, ranked, kept), page)


def _lines(search: "Search", out: Path) -> Iterator[str]:
    session, result = search.session, search.result
    runner, measured = session.runner, result.measured
    yield f"wrote {out}"
    yield f"vision tokens per layer: {runs(result.candidate.keeps)} of {result.candidate.parts}"
    yield f"score: {result.candidate.score}"
    share = session.flops_share(result.candidate)
    tokens = result.candidate.mean_keep
    yield f"decoder prefill: {share:.3f} of the FLOPs, {tokens:.3f} of the tokens"
    if measured is not None and measured.metric is not None:
        whole = session.unpruned.metric
        yield f"{session.metric.name}: {measured.metric:.4f}, unpruned {whole:.4f}"
    if (timed := result.latency) is not None:
        yield (
            f"prefill on {timed.backend}: {timed.measured_ms:.4g} ms, "
            f"{timed.predicted_ms:.4g} predicted, unpruned {timed.unpruned_ms:.4g}"
        )
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


def choose_vtw(setup: "Setup", out: Path, eta: float, first_layer: int, as_json: bool) -> None:
    """The schedule of VTW's rule, or an error where no layer does without the image."""
    from vtr_export.schedule import Schedule
    from vtr_export.search.session import Session
    from vtr_export.search.text_file import write_text
    from vtr_export.search.vtw import check_rule, choose_k

    with progress() as announce:
        session = Session(setup, say=announce)
        check_rule(session.space, eta, first_layer)
        with session:
            layer = choose_k(session.runner.measure, session.space, eta, first_layer)
    if layer is None:
        raise InputError(
            f"every layer from {first_layer} on needs the image: its KL stays above {eta:g}",
            hint="allow more with --eta, or drop tokens by degrees: vtr search gsearch",
        )
    write_text(out, Schedule.vtw(layer).dump(), "the schedule")
    report(
        {"schedule": str(out), "k": layer, "eta": eta, "questions": len(session.calibration)},
        [f"wrote {out}", f"all vision tokens are withdrawn before layer {layer}"],
        as_json,
    )


def show_ranks(
    model: str,
    calibration: Path,
    page: Path | None,
    score: str,
    limit: int,
    device: str,
    as_json: bool,
) -> None:
    """How alike the layers rank tokens, as a table and a picture."""
    from vtr_export.checkpoint import find_folder
    from vtr_export.search.candidate import SCORES
    from vtr_export.search.evaluators.torch_model import TorchModel
    from vtr_export.search.questions.calibration import CalibrationSet
    from vtr_export.search.ranks import model_ranks
    from vtr_export.search.report.page import SearchReport, write

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
