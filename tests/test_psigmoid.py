"""P-Sigmoid: finds what is known to be best, never leaves the budget, survives being killed."""

import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_search import SCORE, SPACE, Synthetic, Task, blocks_of, runner_of
from test_curves import facts, one_more

from vtr_export.errors import InputError, UnavailableError, VtrError
from vtr_export.search.budget import Budget, Workload, parse_budget
from vtr_export.search.candidate import Candidate, Score, Space
from vtr_export.search.comparison import compare
from vtr_export.search.curves import Pyramid, Sigmoid, candidate_at, solve
from vtr_export.search.ledger.ledger import Ledger
from vtr_export.search.psigmoid import Tuned, fit_sigmoid, psigmoid, worth
from vtr_export.search.trial_store import Result

WIDE = Space(facts(12, 144))
BUDGET = parse_budget("flops=0.4").bind(WIDE.facts, Workload(144, 24))
BEST = solve(Sigmoid(0.12, 1.3), WIDE, Score(), BUDGET).candidate
SMALL = Budget("tokens=0.6", 0.6, lambda candidate: candidate.mean_keep)


@dataclass(frozen=True)
class Measured:
    candidate: Candidate
    metric: float | None
    kl: float | None
    seen: int = 1000


@dataclass
class Formula:
    """The metric falls with the distance from ``best``, by steps of ``1 / seen``."""

    best: Candidate = BEST
    steps: int = 1000
    asked: list[list[Candidate]] = field(default_factory=list)
    before: Callable[[], None] = lambda: None

    def measure(self, candidates: Sequence[Candidate]) -> list[Measured]:
        self.before()
        self.asked.append(list(candidates))
        return [self._one(candidate) for candidate in candidates]

    def _one(self, candidate: Candidate) -> Measured:
        apart = np.abs(np.subtract(candidate.keeps, self.best.keeps)).mean() / candidate.parts
        return Measured(candidate, round((1 - apart) * self.steps) / self.steps, apart, self.steps)

    @property
    def all_asked(self) -> list[Candidate]:
        return [candidate for call in self.asked for candidate in call]


def test_it_comes_close_to_what_is_best_and_closer_than_its_first_guesses() -> None:
    tuned = psigmoid(Formula(), WIDE, BUDGET, Score(), trials=20)
    guesses = [trial.result.metric for trial in tuned.trials if trial.origin == "given"]
    assert tuned.best.result.metric > 0.985 > max(guesses)


def test_what_gsearch_found_is_tried_first() -> None:
    """Of another budget: its shape is taken, and moved to where this budget is met."""
    richer = Budget("flops=0.6", 0.6, BUDGET.cost)
    found = solve(Sigmoid(0.12, 1.3), WIDE, Score(), richer).candidate
    tuned = psigmoid(Formula(), WIDE, BUDGET, Score(), trials=1, warm=[found])
    assert tuned.best.result.metric > 0.985


def test_every_trial_meets_the_budget_to_the_token() -> None:
    tuned = psigmoid(Formula(), WIDE, BUDGET, Score(), trials=11, batch=3)
    assert len(tuned.trials) == 11
    for trial in tuned.trials:
        candidate = trial.solved.candidate
        assert trial.solved.cost == BUDGET.cost(candidate) <= BUDGET.target
        assert all(BUDGET.cost(more) > BUDGET.target for more in one_more(candidate))


def test_a_run_repeats_and_seeds_differ() -> None:
    first, again, other = (
        psigmoid(Formula(), WIDE, BUDGET, Score(), trials=10, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first.to_json() == again.to_json()
    assert first.trials[:6] == other.trials[:6]  # first guesses are nobody's chance
    assert first.trials[6:] != other.trials[6:]


def test_a_batch_is_measured_in_one_call_and_a_schedule_once() -> None:
    runner = Formula()
    tuned = psigmoid(runner, WIDE, BUDGET, Score(), trials=8, batch=4)
    assert [len(call) for call in runner.asked] == [4, 4]
    few = Space(facts(3, 2))
    runner = Formula(few.unpruned())
    tuned = psigmoid(runner, few, SMALL, Score(), trials=10, batch=4)
    assert len(tuned.trials) == 10
    assert len(runner.all_asked) == len(set(runner.all_asked)) < 10


def test_kl_decides_among_equals() -> None:
    flat = Formula(steps=1)  # every schedule has the same metric
    tuned = psigmoid(flat, WIDE, BUDGET, Score(), trials=8)
    assert len({trial.result.metric for trial in tuned.trials}) == 1
    assert tuned.best.result.kl == min(trial.result.kl for trial in tuned.trials)


@given(
    st.integers(1, 5000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
)
def test_no_kl_outweighs_a_question(known: tuple[int, int], low: float, high: float) -> None:
    seen, right = known
    worse = Result(right / seen, min(low, high), seen)
    better = replace(worse, metric=(right + 1) / seen, kl=max(low, high))
    assert worth(better) >= worth(worse) - 1e-12
    assert worth(worse) >= worth(replace(worse, kl=max(low, high)))


@pytest.mark.parametrize("floor", [0.0, 0.2])
@pytest.mark.parametrize("gamma", [0.3, 1.0, 4.0])
def test_a_sigmoid_is_recognised(floor: float, gamma: float) -> None:
    space = Space(facts(24, 1000))
    found = fit_sigmoid(candidate_at(Sigmoid(floor, gamma), 10.3, space, Score()))
    assert found == (pytest.approx(floor, abs=0.02), pytest.approx(gamma, rel=0.1))


# --- killed, and begun again ---


class KilledError(BaseException):
    """As good as kill -9 for what is asked here: nobody catches it."""


def after(calls: int) -> Callable[[], None]:
    left = iter(range(calls))

    def maybe() -> None:
        if next(left, None) is None:
            raise KilledError

    return maybe


def is_killed(body: Callable[[], object]) -> bool:
    """Run ``body`` in a new process (a fork would inherit torch's threads); was it SIGKILLed?"""
    child = get_context("spawn").Process(target=body)
    child.start()
    child.join()
    return child.exitcode == -signal.SIGKILL


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tune_until_commit(url: str, commits: int) -> None:
    """Killed instead of the next transaction after so many."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    left = iter(range(commits))
    event.listen(Engine, "commit", lambda _: None if next(left, None) is not None else die())
    tune(Formula(), url)


def tune_until_proposal(url: str, proposals: int) -> None:
    """Killed when a proposal was made, after so many, and its parameters are not yet written."""
    propose, left = optuna.samplers.GPSampler.sample_relative, iter(range(proposals))

    def watched(*given: Any) -> dict[str, Any]:
        proposal = propose(*given)
        if proposal and next(left, None) is None:
            die()
        return proposal

    optuna.samplers.GPSampler.sample_relative = watched  # in the child, which dies
    tune(Formula(), url)


def tune(runner: Formula, storage: str | None = None) -> Tuned:
    return psigmoid(runner, WIDE, BUDGET, Score(), trials=9, batch=3, storage=storage)


def test_a_study_in_a_database_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    whole = Formula()
    expected = tune(whole)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    lives = 0
    while is_killed(
        partial(tune_until_commit, url, 10 + 40 * lives)
    ):  # each gets a little further than the one before
        lives += 1
    assert lives > 1
    idle = Formula()
    assert tune(idle, url) == expected
    assert idle.asked == []


@pytest.mark.parametrize("proposals", [0, 1])
def test_a_proposal_that_was_half_written_is_made_again(tmp_path: Path, proposals: int) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    assert is_killed(partial(tune_until_proposal, url, proposals))
    assert tune(Formula(), url) == tune(Formula())


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_trials_that_were_running_are_measured_again(tmp_path: Path, calls: int) -> None:
    whole = Formula()
    expected = tune(whole)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with pytest.raises(KilledError):
        tune(Formula(before=after(calls)), url)
    rest = Formula()
    assert tune(rest, url) == expected
    assert rest.asked == whole.asked[calls:]


def test_another_identity_is_another_study(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    runs = []
    for model in ("a", "b", "a"):
        runner = Formula()
        psigmoid(runner, WIDE, BUDGET, Score(), trials=2, storage=url, identity={"model": model})
        runs.append(len(runner.all_asked))
    assert runs == [2, 2, 0]


def tune_on(path: Path, evaluator: Synthetic) -> tuple[Tuned, int]:
    with Ledger.open(path, evaluator.fingerprint()) as ledger:
        runner = runner_of(evaluator, ledger)
        return psigmoid(runner, SPACE, SMALL, SCORE, trials=9, batch=3), runner.computed


@pytest.mark.parametrize("calls", [0, 1, 7, 13])
def test_a_run_goes_on_from_its_ledger(tmp_path: Path, calls: int) -> None:
    blocks = blocks_of(200)
    expected, computed = tune_on(tmp_path / "whole", Synthetic(blocks))
    maybe = after(calls)

    def heard(task: Task) -> None:
        maybe()

    path = tmp_path / "killed"
    with pytest.raises(KilledError):
        tune_on(path, Synthetic(blocks, heard=heard))
    tuned, rest = tune_on(path, Synthetic(blocks))
    assert tuned == expected
    assert rest == computed - calls


# --- mistakes ---


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("study.db", "parse"),
        ("", "parse"),
        ("abacus://here", "abacus"),
        ("sqlite:////nowhere/at/all/study.db", "unable to open"),
        ("sqlite:///{text}", "not a database"),
    ],
)
def test_a_storage_that_does_not_answer(tmp_path: Path, url: str, says: str) -> None:
    text = tmp_path / "text.db"
    text.write_text("no database, but long enough to be looked at: " * 99)
    with pytest.raises(InputError, match=says):
        tune(Formula(), url.format(text=text))


def test_a_password_stays_unsaid() -> None:
    url = "postgresql+psycopg2://me:secret@127.0.0.1:1/studies"
    with pytest.raises(VtrError) as error:
        tune(Formula(), url)
    assert "secret" not in str(error.value)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UnavailableError, match="optuna") as error:
        tune(Formula())
    assert "vtr-export[search]" in error.value.hint


@pytest.mark.parametrize("option", ["trials", "batch"])
def test_numbers_out_of_range(option: str) -> None:
    with pytest.raises(InputError, match=option):
        psigmoid(Formula(), WIDE, BUDGET, Score(), **{option: 0})


def test_a_budget_below_layer_0_is_refused_before_anything_is_measured() -> None:
    runner, budget = Formula(), replace(BUDGET, text="flops=0.05", target=0.05)
    with pytest.raises(InputError, match="layer 0"):
        psigmoid(runner, WIDE, budget, Score())
    assert not runner.asked


# --- beside others ---


def test_others_are_measured_at_the_same_budget() -> None:
    ours, runner = Score("previous", "text", "mean"), Formula()
    rows = {row.name: row for row in compare(runner, WIDE, BUDGET, ours, found={"P-Sigmoid": BEST})}
    assert len(runner.asked) == 1
    assert rows["P-Sigmoid"].metric == 1
    for row in rows.values():
        assert row.candidate is not None
        assert row.cost == BUDGET.cost(row.candidate) <= BUDGET.target
        assert all(BUDGET.cost(more) > BUDGET.target for more in one_more(row.candidate))
        assert row.metric is not None
        assert row.to_json()["metric"] == row.metric
    published = {name: row.candidate.score for name, row in rows.items() if row.candidate}
    assert published.pop("FastV") == Score("previous", "last", "mean")
    assert published.pop("PyramidDrop") == Score("next", "last", "mean")
    del published["P-Sigmoid"]
    assert set(published.values()) == {ours}
    assert len({row.candidate for name, row in rows.items() if name.startswith("random")}) == 3
    assert rows["FastV"].candidate.cut_layers()[0] == 2
    assert rows["PyramidDrop"].candidate.cut_layers()[0] == 3


def test_a_method_that_cannot_cost_so_little_says_so() -> None:
    budget = Budget("tokens=0.15", 0.15, lambda candidate: candidate.mean_keep)
    rows = {row.name: row for row in compare(Formula(), WIDE, budget, Score("next"))}
    # two whole layers of twelve are more than 0.15, and so are the three before a pyramid's first
    assert "K = 1" in rows["FastV"].note
    assert rows["FastV"].candidate.cut_layers()[0] == 1
    firsts = [12 // parts for parts in range(1, 13) if 12 // parts < 0.15 * 12]
    assert rows["PyramidDrop"].candidate.cut_layers()[0] == firsts[0]
    assert "cannot" in rows["PyramidDrop"].note
    assert solve(Pyramid(7), WIDE, Score(), budget).candidate.keeps[1] < 144
    assert math.isclose(rows["linear"].cost, 0.15, abs_tol=1 / 144)


def test_an_artifact_of_one_score_is_not_compared_by_another() -> None:
    only = Score("previous", "text", "max")
    rows = compare(Formula(), replace(WIDE, scores=(only,)), BUDGET, only)
    missing = {row.name for row in rows if row.metric is None}
    assert missing == {"FastV", "PyramidDrop"}
    assert all(row.note for row in rows if row.name in missing)
