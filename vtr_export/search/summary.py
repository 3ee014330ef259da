"""What a search found, for scripts and for the report."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vtr_export.search.candidate import Candidate
from vtr_export.search.comparison import Row
from vtr_export.search.methods import Search
from vtr_export.search.questions.statistics import image_groups, paired_difference
from vtr_export.search.report import page as pages

if TYPE_CHECKING:
    from vtr_export.search.ranks import Ranks


def to_json(search: Search, schedule: str, warnings: list[str]) -> dict[str, Any]:
    """The last line of ``--json``.

    ``flops_ratio`` is what the search spent of what a naive one would have; ``schedule_flops`` is
    the schedule's prefill, of the unpruned model's.
    """
    session, result = search.session, search.result
    runner, measured = session.runner, result.measured
    values: dict[str, Any] = {
        "schedule": schedule,
        "method": result.method,
        "complete": result.is_complete,
        "keep": list(result.candidate.keeps),
        "parts": result.candidate.parts,
        "score": result.candidate.score.to_data(),
        "metric": None if measured is None else measured.metric,
        "unpruned_metric": session.unpruned.metric,
        "kl": None if measured is None else measured.kl,
        "questions": len(session.calibration),
        "schedule_flops": session.flops_share(result.candidate),
        "schedule_tokens": result.candidate.mean_keep,
        "evaluations": runner.evaluations,
        "decoder_flops_spent": runner.decoder_flops_spent,
        "decoder_flops_naive": runner.decoder_flops_naive,
        "flops_ratio": runner.decoder_flops_spent / runner.decoder_flops_naive,
        "resumed": runner.reused > 0,
        "reused_results": runner.reused,
        "seconds": round(result.seconds, 3),
        "warnings": warnings,
    }
    if result.held_out is not None:
        values["held_out"] = asdict(result.held_out)
    if result.found is not None:
        values["violations"] = [asdict(one) for one in result.found.violations()]
    if result.compared:
        values["compared"] = [row.to_json() for row in result.compared]
    if result.latency is not None:
        values["latency"] = asdict(result.latency)
    return values


def to_report(
    search: Search,
    schedule: str,
    ranks: "Ranks | None" = None,
    kept: tuple[pages.KeptImage, ...] = (),
) -> pages.SearchReport:
    """Everything the page shows."""
    session, result = search.session, search.result
    found, tuned = result.found, result.tuned
    return pages.SearchReport(
        title=f"{_TITLES[result.method]} on {session.folder.resolve().name}",
        metric=session.metric.name,
        parts=session.space.parts,
        varies=session.facts.tokens_per_image is None,
        notes=tuple(session.warnings),
        result=_result(search),
        effort=_effort(search),
        curves=_curves(search),
        points=_points(search),
        tries=found.tries if found else (),
        floor=result.floor,
        violations=found.violations() if found else (),
        scores=tuple(
            pages.ScoreTrial(
                str(trial.score), trial.measured.metric or 0.0, trial.measured.kl, i == 0
            )
            for i, trial in enumerate(result.scores)
        ),
        tuned=tuned,
        budget=result.budget.text if result.budget else "",
        compared=tuple(_compared(search, row) for row in result.compared),
        compared_as=f"{_TITLES[result.method]} less this",
        ranks=ranks,
        kept=kept,
        provenance=_provenance(search),
        schedule=schedule,
    )


_TITLES = {"g-search": "G-Search", "p-sigmoid": "P-Sigmoid"}


def _result(search: Search) -> pages.Result | None:
    session, result = search.session, search.result
    tokens, flops = result.candidate.mean_keep, session.flops_share(result.candidate)
    held = result.held_out
    if held is not None and session.evaluation is not None:
        return pages.Result(
            held.metric,
            held.unpruned,
            len(session.evaluation),
            held.difference,
            tokens,
            flops,
            measured_on=session.evaluation.name,
        )
    if result.measured is None or result.measured.metric is None:
        return None
    whole = session.unpruned.metric or 0.0
    count = len(session.calibration)
    return pages.Result(result.measured.metric, whole, count, tokens=tokens, flops=flops)


def _effort(search: Search) -> pages.Effort:
    runner = search.session.runner
    return pages.Effort(
        runner.evaluations,
        runner.decoder_flops_spent,
        runner.decoder_flops_naive,
        runner.reused,
        search.result.seconds,
        runner.reused > 0,
    )


def _curves(search: Search) -> tuple[pages.Curve, ...]:
    result = search.result
    others = tuple(
        pages.Curve(row.name, row.candidate.keeps)
        for row in result.compared
        if row.candidate is not None and row.candidate != result.candidate
    )
    return (pages.Curve(_TITLES[result.method], result.candidate.keeps, "result"), *others)


def _points(search: Search) -> tuple[pages.Point, ...]:
    """Every schedule that was measured whole, on the calibration set."""
    session, result = search.session, search.result
    named: Mapping[Candidate, str] = {
        row.candidate: row.name for row in result.compared if row.candidate is not None
    }
    points = [pages.Point("unpruned", 1.0, session.unpruned.metric or 0.0, "unpruned")]
    for measured in session.runner.known():
        candidate, metric = measured.candidate, measured.metric
        if metric is None or candidate.is_unpruned:
            continue
        is_result = candidate == result.candidate
        role: pages.Role = "comparison" if candidate in named else "measured"
        name = _TITLES[result.method] if is_result else named.get(candidate, "")
        cost = session.flops_share(candidate)
        points.append(pages.Point(name, cost, metric, "result" if is_result else role))
    return tuple(points)


def _compared(search: Search, row: Row) -> pages.Compared:
    """With the found schedule's lead over it on the calibration set."""
    found, other = search.result.measured, search.session.runner.measured(row.candidate)
    if row.candidate == search.result.candidate:
        return pages.Compared.of(row, role="result")
    if other is None or found is None:
        return pages.Compared.of(row)
    assert found.questions is not None, "measured whole"
    assert other.questions is not None, "measured whole"
    groups, reach = image_groups(search.session.calibration.questions), search.session.metric.reach
    lead = paired_difference(found.questions, other.questions, groups, reach=reach)
    return pages.Compared.of(row, lead)


def _provenance(search: Search) -> dict[str, str]:
    session = search.session
    values = {
        "calibration set": f"{session.calibration.name}, {len(session.calibration)} questions",
        **{name: str(value) for name, value in search.origin().items()},
        "device": session.setup.device,
        "dtype": session.setup.dtype,
    }
    if session.evaluation is not None:
        values["held-out set"] = f"{session.evaluation.name}, {len(session.evaluation)} questions"
    return values
