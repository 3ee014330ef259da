"""The searches, from a session to what was found."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from vtr_export import __version__
from vtr_export.errors import InputError
from vtr_export.search.budget import Budget, BudgetOption
from vtr_export.search.candidate import Candidate, Score, Space
from vtr_export.search.comparison import Row, compare
from vtr_export.search.gsearch import Found, Spend, floors, gsearch, levels_of
from vtr_export.search.latency import LatencyTable, measure, time_candidate
from vtr_export.search.psigmoid import Ranges, Tuned, check_counts, psigmoid
from vtr_export.search.questions.statistics import Difference, image_groups, paired_difference
from vtr_export.search.runner import Measured
from vtr_export.search.session import Say, Session, check_tolerance

PROBE_BLOCKS = 2  # that scores are compared on
PROBE_LAYER = 2  # FastV's
PROBE_SHARE = 8  # an eighth of the tokens is left
RIVAL = "FastV"
Method: TypeAlias = Literal["g-search", "p-sigmoid"]
_WARM = "g-search"  # what a ledger calls the last one's result


@dataclass(frozen=True)
class ScoreTrial:
    """A score at one cut, all else equal."""

    score: Score
    measured: Measured


@dataclass(frozen=True)
class Rival:
    """Another schedule on the held-out questions; ``difference`` is the found one's lead."""

    name: str
    metric: float
    difference: Difference


@dataclass(frozen=True)
class HeldOut:
    """The schedule on questions that it was not chosen by; ``difference`` is to the unpruned."""

    metric: float
    unpruned: float
    difference: Difference
    rivals: tuple[Rival, ...] = ()


@dataclass(frozen=True)
class Latency:
    """Prefill in ms of the found schedule's own graph, and the unpruned one's."""

    backend: str
    predicted_ms: float
    measured_ms: float
    unpruned_ms: float


@dataclass
class Result:
    """What a search found; ``is_complete`` is false where it was interrupted."""

    method: Method
    candidate: Candidate
    measured: Measured | None = None
    is_complete: bool = False
    scores: tuple[ScoreTrial, ...] = ()
    found: Found | None = None
    floor: Callable[[int], float] | None = None
    tuned: Tuned | None = None
    budget: Budget | None = None
    compared: tuple[Row, ...] = ()
    held_out: HeldOut | None = None
    latency: Latency | None = None
    options: dict[str, Any] = field(default_factory=dict)  # for ``origin``
    seconds: float = 0.0


@dataclass(frozen=True)
class GSearch:
    """Options of G-Search; see :func:`vtr_export.search.gsearch.gsearch`."""

    tolerance: float = 0.002
    spend: Spend = "even"
    step: int = 1
    first_layers: tuple[int, ...] = (1,)  # with a cut before them; the cheapest result is taken
    checks: int = 1

    def check(self, session: Session, scores: Sequence[Score]) -> None:
        """InputError for what no search can do with the session's questions and layers."""
        check_tolerance(self.tolerance, len(session.calibration), session.metric)
        _check_layers(self, session.space)


@dataclass(frozen=True)
class PSigmoid:
    """Options of P-Sigmoid; see :func:`vtr_export.search.psigmoid.psigmoid`."""

    budget: BudgetOption
    trials: int = 40
    batch: int = 4
    storage: str | None = None
    has_comparison: bool = True

    def check(self, session: Session, scores: Sequence[Score]) -> None:
        """InputError for what none of ``scores`` can meet; a latency is known once it is timed."""
        check_counts(self.trials, self.batch)
        if self.budget.backend is None:
            budget, space = self.budget.bind(session.facts, session.workload), session.space
            cheapest = min(scores, key=lambda score: budget.cost(space.step(1, 0, score)))
            Ranges.of(space, cheapest, budget)
        elif not session.is_checkpoint:
            raise InputError(
                f"--budget {self.budget.text} times exports of a checkpoint, and this is an "
                "artifact",
                where=str(session.folder),
                hint="search on the checkpoint, or give a budget in flops or tokens",
            )


Options: TypeAlias = GSearch | PSigmoid


class Search:
    """One search of a session; ``result`` is what is known so far, at any time.

    Options are checked before the session is opened, which :meth:`run` needs.
    """

    def __init__(
        self, session: Session, scores: Sequence[Score], options: Options, say: Say
    ) -> None:
        options.check(session, scores)
        self.session, self.scores, self._say = session, tuple(scores), say
        self.options = options
        method: Method = "g-search" if isinstance(options, GSearch) else "p-sigmoid"
        self.result = Result(method, session.space.unpruned())

    def run(self) -> Result:
        """Search, and measure what was found."""
        self._start = time.monotonic()
        self.result.measured = self.session.unpruned
        if isinstance(self.options, GSearch):
            return self._gsearch(self.options)
        return self._psigmoid(self.options)

    def _gsearch(self, options: GSearch) -> Result:
        """The fewest tokens within a tolerance."""
        session, score = self.session, self._choose_score()
        found = [self._search_from(first, options, score) for first in options.first_layers]
        best = min(found, key=lambda one: session.flops_share(one.candidate))
        first = options.first_layers[found.index(best)]
        self.result.found, self.result.candidate = best, best.candidate
        self.result.floor = self._floors(first, options)
        self.result.options = {
            "tolerance": options.tolerance,
            "spend": options.spend,
            "step": options.step,
            "first_layer": first,
        }
        noted = {"keeps": best.candidate.keeps, "score": score.to_data()}
        session.ledger.note(_WARM, noted)
        return self._finish()

    def _search_from(self, first: int, options: GSearch, score: Score) -> Found:
        session, levels = self.session, levels_of(self.session.space.parts, options.step)

        def decided(found: Found) -> None:
            self.result.candidate = found.candidate
            session.runner.expected = (session.space.layers - 1 - found.layer) * len(
                levels
            ).bit_length()
            self._say(f"layer {found.layer} keeps {found.candidate.keeps[found.layer]}")

        if len(options.first_layers) > 1:
            self._say(f"cuts from layer {first} on")
        return gsearch(
            session.runner,
            session.space,
            score,
            floor=self._floors(first, options),
            levels=levels,
            first=first,
            checks=options.checks,
            decided=decided,
        )

    def _floors(self, first: int, options: GSearch) -> Callable[[int], float]:
        layers = range(first, self.session.space.layers)
        return floors(_mean(self.session.unpruned), options.tolerance, layers, options.spend)

    def _psigmoid(self, options: PSigmoid) -> Result:
        """The best sigmoid at a budget."""
        session = self.session
        self.result.options = {"budget": options.budget.text, "trials": options.trials}
        score = self._choose_score()
        table = self._latency_table(options.budget, score)
        budget = options.budget.bind(session.facts, session.workload, table)
        self.result.budget = budget
        session.runner.settle(session.space.step(1, session.space.parts, score), 1)

        def tried(tuned: Tuned) -> None:
            self.result.tuned = tuned
            best = tuned.best
            self.result.candidate = best.solved.candidate
            session.runner.expected = options.trials - len(tuned.trials)
            self._say(f"{len(tuned.trials)} of {options.trials} curves, {best.result.metric:.4f}")

        self.result.tuned = psigmoid(
            session.runner,
            session.space,
            budget,
            score,
            trials=options.trials,
            batch=options.batch,
            seed=session.setup.seed,
            warm=self._warm(score),
            storage=options.storage,
            identity=session.identity(),
            progress=tried,
        )
        self.result.candidate = self.result.tuned.best.solved.candidate
        if options.has_comparison:
            self._say("other curves at the same budget")
            self.result.compared = compare(
                session.runner,
                session.space,
                budget,
                score,
                seed=session.setup.seed,
                found={"P-Sigmoid": self.result.candidate},
            )
        if table is not None:
            self.result.latency = self._time(table)
        return self._finish()

    def origin(self) -> dict[str, Any]:
        """Where the schedule comes from, for its document."""
        session, result = self.session, self.result
        measured = result.measured
        values = {
            "method": result.method,
            **result.options,
            "metric": session.metric.name,
            "measured": None if measured is None else measured.metric,
            "unpruned": session.unpruned.metric,
            "questions": len(session.calibration),
            "calibration": f"sha256:{session.calibration.sha256}",
            "model": f"sha256:{session.identity()['model']}",
            "seed": session.setup.seed,
            "complete": result.is_complete,
            "tool": f"vtr-export {__version__}",
        }
        return {name: value for name, value in values.items() if value is not None}

    def _finish(self) -> Result:
        session, result = self.session, self.result
        (result.measured,) = session.runner.measure([result.candidate])
        result.held_out = self._hold_out()
        result.is_complete = True
        result.seconds = time.monotonic() - self._start
        return result

    def _hold_out(self) -> HeldOut | None:
        """The schedule beside the unpruned model, and beside FastV at the same budget."""
        session = self.session
        if session.held_out is None or session.evaluation is None:
            return None
        self._say(f"answering {len(session.evaluation)} held-out questions")
        rivals = {
            row.name: row.candidate
            for row in self.result.compared
            if row.candidate is not None and row.name.startswith(RIVAL)
        }
        whole = session.held_out.unpruned()
        pruned, *others = session.held_out.measure([self.result.candidate, *rivals.values()])
        return HeldOut(
            _mean(pruned),
            _mean(whole),
            self._difference(pruned, whole),
            tuple(
                Rival(name, _mean(other), self._difference(pruned, other))
                for name, other in zip(rivals, others, strict=True)
            ),
        )

    def _difference(self, first: Measured, second: Measured) -> Difference:
        evaluation = self.session.evaluation
        assert evaluation is not None, "asked only with one"
        assert first.questions is not None, "measured whole"
        assert second.questions is not None, "measured whole"
        groups, reach = image_groups(evaluation.questions), self.session.metric.reach
        return paired_difference(first.questions, second.questions, groups, reach=reach)

    def _choose_score(self) -> Score:
        """The score that does best at FastV's cut on a part of the set; KL decides among equals."""
        session = self.session
        if len(self.scores) == 1:
            return self.scores[0]
        layer = min(PROBE_LAYER, session.space.layers - 1)
        keep = session.space.parts // PROBE_SHARE
        self._say(f"{len(self.scores)} scores, {keep} tokens from layer {layer} on")
        probes = [session.space.step(layer, keep, score) for score in self.scores]
        session.runner.settle(session.space.unpruned(), layer - 1)
        measured = session.runner.measure(probes, blocks=PROBE_BLOCKS)
        trials = [ScoreTrial(s, m) for s, m in zip(self.scores, measured, strict=True)]
        trials.sort(key=lambda trial: (-(trial.measured.metric or 0), trial.measured.kl or 0))
        self.result.scores = tuple(trials)
        self._say(f"score: {trials[0].score}")
        return trials[0].score

    def _warm(self, score: Score) -> list[Candidate]:
        """G-Search's result, if the ledger has one."""
        noted = self.session.ledger.noted(_WARM)
        if noted is None:
            return []
        return [Candidate(tuple(noted["keeps"]), score, self.session.space.parts)]

    def _latency_table(self, option: BudgetOption, score: Score) -> LatencyTable | None:
        """Measured once a ledger: a resumed search goes by the same times."""
        if option.backend is None:
            return None
        session, name = self.session, f"latency {option.backend} {score}"
        noted = session.ledger.noted(name)
        if noted is not None:
            return LatencyTable.from_json(noted)
        self._say(f"timing prefill on {option.backend}")
        table = measure(
            session.folder, option.backend, score, session.workload, dtype=session.setup.dtype
        )
        session.ledger.note(name, table.to_json())
        return table

    def _time(self, table: LatencyTable) -> Latency:
        session, candidate = self.session, self.result.candidate
        self._say(f"timing the schedule on {table.backend}")
        pruned, unpruned = time_candidate(
            session.folder, table.backend, candidate, session.workload, dtype=session.setup.dtype
        )
        return Latency(table.backend, table.predict_ms(candidate), pruned, unpruned)


def _mean(measured: Measured) -> float:
    assert measured.metric is not None, "measured whole"
    return measured.metric


def _check_layers(options: GSearch, space: Space) -> None:
    """InputError for a first layer or a step that cannot be."""
    for first in options.first_layers:
        if not 1 <= first < space.layers:
            raise InputError(
                f"--first-layer {first} of {space.layers} layers",
                hint=f"1 to {space.layers - 1}: before layer 0 nothing ranks the tokens",
            )
    if not 1 <= options.step <= space.parts:
        raise InputError(
            f"--step {options.step} of {space.parts} tokens",
            hint=f"1 tries every keep, {max(1, space.parts // 8)} an eighth at a time",
        )
