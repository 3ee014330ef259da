"""P-Sigmoid: the best sigmoid curve at a budget, found by Bayesian optimisation (2412.00556).

Free are ``floor`` and ``gamma``; ``c`` is solved, so that every trial meets the budget exactly.

* ``floor`` is drawn evenly from 0 to u, the share that one cut before layer 1 may keep at this
  budget: more in the deepest layers costs more than the budget wherever the curve falls.
* ``gamma`` is drawn evenly in its logarithm from 1/L (a fall over more layers than there are, all
  but a line) to 10 (a step between two layers, which makes FastV and VTW members of the family).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final, Literal, Protocol

import numpy as np

from vtr_export.errors import InputError
from vtr_export.extras import require
from vtr_export.search.budget import Budget
from vtr_export.search.candidate import Candidate, Score, Space
from vtr_export.search.curves import FastV, Floats, Sigmoid, Solved, reach, solve
from vtr_export.search.trial_store import Asked, Params, Result, StudyPlan, TrialStore

STEEPEST: Final = 10.0
STEPS: Final = (1, 2, 3)  # FastV's K among the first trials
Origin = Literal["given", "sampled"]


class Measured(Protocol):
    """How a candidate did on the whole set."""

    @property
    def candidate(self) -> Candidate:
        """What was asked."""
        ...

    @property
    def metric(self) -> float | None:
        """Mean over all questions."""
        ...

    @property
    def kl(self) -> float | None:
        """Mean over all questions, in nats."""
        ...

    @property
    def seen(self) -> int:
        """Questions looked at."""
        ...


class Measures(Protocol):
    """What measures candidates: a ``Runner``."""

    def measure(self, candidates: Sequence[Candidate]) -> Sequence[Measured]:
        """Each on the whole set, in the order given; several may run at once."""
        ...


@dataclass(frozen=True)
class Trial:
    """One curve that was measured; ``origin`` tells first guesses from the optimiser's."""

    number: int
    origin: Origin
    solved: Solved
    result: Result

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "number": self.number,
            "origin": self.origin,
            **self.solved.to_json(),
            "metric": self.result.metric,
            "kl": self.result.kl,
        }


@dataclass(frozen=True)
class Tuned:
    """All trials, in the order they were asked for; ``ranges`` are what was searched."""

    trials: tuple[Trial, ...]
    ranges: "Ranges"
    budget: Budget

    @property
    def best(self) -> Trial:
        """The highest metric; among equals the least KL, then the least cost, then the first."""
        return min(self.trials, key=_rank)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "budget": self.budget.text,
            "target": self.budget.target,
            "ranges": {"floor": list(self.ranges.floor), "gamma": list(self.ranges.gamma)},
            "best": self.best.number,
            "trials": [trial.to_json() for trial in self.trials],
        }


def _rank(trial: Trial) -> tuple[float, ...]:
    result = trial.result
    return -round(result.metric, 9), result.kl or 0.0, trial.solved.cost, trial.number


@dataclass(frozen=True)
class Ranges:
    """Where the free parameters are searched."""

    floor: tuple[float, float]
    gamma: tuple[float, float]

    @classmethod
    def of(cls, space: Space, score: Score, budget: Budget) -> "Ranges":
        """See the module. InputError for a budget below layer 0's share."""
        solve(Sigmoid(0.0, STEEPEST), space, score, budget)  # says what sigmoids reach
        uniform = solve(FastV(1), space, score, budget)
        return cls((0.0, uniform.value), (1 / space.layers, STEEPEST))

    def to_data(self) -> dict[str, tuple[float, float, bool]]:
        """Least, most, and whether logarithms are drawn evenly."""
        return {"floor": (*self.floor, False), "gamma": (*self.gamma, True)}

    def clip(self, floor: float, gamma: float) -> Params:
        """The nearest in range."""
        return {
            "floor": float(np.clip(floor, *self.floor)),
            "gamma": float(np.clip(gamma, *self.gamma)),
        }


def psigmoid(
    runner: Measures,
    space: Space,
    budget: Budget,
    score: Score,
    *,
    trials: int = 40,
    seed: int = 0,
    batch: int = 4,
    warm: Sequence[Candidate] = (),
    storage: str | None = None,
    identity: Mapping[str, str] | None = None,
    progress: Callable[[Tuned], None] = lambda tuned: None,
) -> Tuned:
    """Tune the sigmoid's floor and steepness at a budget; each of ``trials`` meets it.

    The first trials are curves fitted to ``warm`` (G-Search's results) and to what others do; then
    Optuna's Gaussian process proposes ``batch`` at a time, whatever the number of workers, each by
    a generator of its own, seeded by (``seed``, trial). So on one machine a run depends on its
    arguments and the measurements only: one that was killed and begins again on its ledger, or on
    ``storage`` (an Optuna RDB URL, one process at a time), ends with the same schedule.
    ``identity`` is what measurements depend on, so that another model's or calibration set's study
    is not taken up.

    Trials are compared by their metric; KL decides among equals, scaled to less than the share of
    one question. Raises InputError for numbers out of range, a budget out of reach and a storage
    that does not answer, UnavailableError without Optuna.
    """
    check_counts(trials, batch)
    ranges = Ranges.of(space, score, budget)
    starts = first_guesses(ranges, space, score, budget, warm)[:trials]
    plan = {
        "budget": f"{budget.text} {budget.target!r}",
        "space": f"{space.layers} layers, {space.parts} parts, {score}",
        "ranges": repr(ranges),
        "warm": " ".join(candidate.key() for candidate in warm),
        "run": f"{trials} trials by {batch}, seed {seed}",
        "identity": repr(sorted((identity or {}).items())),
    }
    store = TrialStore(StudyPlan(ranges.to_data(), starts, seed), _name(plan), storage)
    run = _Run(runner, store, space, budget, score, len(starts))
    while len(done := run.so_far()) < trials:
        run.next_batch(min(trials, (len(done) // batch + 1) * batch))
        progress(Tuned(run.so_far(), ranges, budget))
    return Tuned(done, ranges, budget)


@dataclass
class _Run:
    """A study and what its trials were measured as."""

    runner: Measures
    store: TrialStore
    space: Space
    budget: Budget
    score: Score
    starts: int
    curves: dict[int, Solved] = field(default_factory=dict)

    def so_far(self) -> tuple[Trial, ...]:
        """Trials that are finished."""
        return tuple(
            Trial(asked.number, self._origin(asked), self._solve(asked), result)
            for asked, result in self.store.finished()
        )

    def next_batch(self, end: int) -> None:
        """Ask up to trial ``end``, measure what is new among the answers, and tell."""
        asked = self.store.ask_until(end)
        known = {trial.solved.candidate: trial.result for trial in self.so_far()}
        candidates = [self._solve(one).candidate for one in asked]
        new = [one for one in dict.fromkeys(candidates) if one not in known]
        for measured in self.runner.measure(new) if new else ():
            assert measured.metric is not None, "measured whole"
            known[measured.candidate] = Result.of(measured.metric, measured.kl, measured.seen)
        for one, candidate in zip(asked, candidates, strict=True):
            self.store.tell(one, known[candidate], worth(known[candidate]))

    def _solve(self, asked: Asked) -> Solved:
        if asked.number not in self.curves:
            curve = Sigmoid(**asked.params)
            self.curves[asked.number] = solve(curve, self.space, self.score, self.budget)
        return self.curves[asked.number]

    def _origin(self, asked: Asked) -> Origin:
        return "given" if asked.number < self.starts else "sampled"


def worth(result: Result) -> float:
    """The metric, less a share of one question's weight that grows with KL."""
    kl = max(result.kl or 0.0, 0.0)
    return result.metric - kl / (1 + kl) / max(result.seen, 1)


def first_guesses(
    ranges: Ranges, space: Space, score: Score, budget: Budget, warm: Sequence[Candidate]
) -> list[Params]:
    """Curves fitted to ``warm``; then FastV's steps, no vision at all deep down, and slow falls."""
    (_, most), (slowest, steepest) = ranges.floor, ranges.gamma
    within = [k for k in STEPS if reach(FastV(k), space, score, budget)[0] <= budget.target]
    steps = [solve(FastV(k), space, score, budget).value for k in within]
    guesses = [
        *(ranges.clip(*fit_sigmoid(candidate)) for candidate in warm),
        *(ranges.clip(keep, steepest) for keep in steps),
        ranges.clip(0.0, steepest),
        ranges.clip(0.0, slowest),
        ranges.clip(most / 2, (slowest * steepest) ** 0.5),
    ]
    return [guess for i, guess in enumerate(guesses) if guess not in guesses[:i]]


def fit_sigmoid(candidate: Candidate) -> tuple[float, float]:
    """``floor`` and ``gamma`` of the sigmoid nearest to a candidate, by least squares."""
    least_squares = require("scipy.optimize", "search", "P-Sigmoid").least_squares
    shares = np.asarray(candidate.keeps) / candidate.parts
    layers = len(shares)

    def residuals(x: Floats) -> Floats:
        floor, log_gamma, centre = x
        return (Sigmoid(floor, np.exp(log_gamma)).shares(layers, centre) - shares)[1:]

    lower, upper = (0.0, np.log(1 / layers), -layers), (1.0, np.log(STEEPEST), 2.0 * layers)
    fits = [
        least_squares(
            residuals, (shares[-1] * 0.98 + 0.01, np.log(gamma), centre), bounds=(lower, upper)
        )
        for gamma in (0.5, 2.0)
        for centre in (layers / 4, layers / 2, 3 * layers / 4)
    ]
    floor, log_gamma, _ = min(fits, key=lambda one: float(one.cost)).x
    return float(floor), float(np.exp(log_gamma))


def _name(plan: Mapping[str, str]) -> str:
    """A study's name: another plan is another study, so that one database serves them all."""
    text = "\n".join(f"{key}: {plan[key]}" for key in sorted(plan))
    return f"vtr P-Sigmoid {sha256(text.encode()).hexdigest()[:16]}"


def check_counts(trials: int, batch: int) -> None:
    """InputError for fewer than one."""
    for name, value in {"trials": trials, "batch": batch}.items():
        if value < 1:
            raise InputError(f"{name} is {value}", hint="give at least 1")
