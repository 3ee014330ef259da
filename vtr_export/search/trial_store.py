"""An Optuna study as P-Sigmoid uses it: what is asked depends on what was told, nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from vtr_export.errors import InputError, UnavailableError
from vtr_export.extras import require

Params = Mapping[str, float]
URLS: Final = "sqlite:///study.db or postgresql://user:password@host/database"
DRIVERS: Final = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary"}


@dataclass(frozen=True)
class Asked:
    """Parameters to try; ``number`` counts from 0 in the order of asking."""

    number: int
    params: Params
    trial_number: int  # Optuna's, which also counts those that were never asked to the end


@dataclass(frozen=True)
class Result:
    """What a trial was measured as, over ``seen`` questions."""

    metric: float
    kl: float | None
    seen: int

    @classmethod
    def of(cls, metric: float, kl: float | None, seen: int) -> "Result":
        """Plain numbers, as a database takes them."""
        return cls(float(metric), None if kl is None else float(kl), int(seen))


@dataclass(frozen=True)
class StudyPlan:
    """What a study asks: ``ranges`` of its parameters as (least, most, logarithmic).

    ``starts`` are asked first, then what Optuna's GPSampler proposes.
    """

    ranges: Mapping[str, tuple[float, float, bool]]
    starts: Sequence[Params]
    seed: int


class TrialStore:
    """Trials of one study, in memory or in a database that another process goes on with.

    Every proposal has a sampler of its own, seeded by the study's seed and the trial's number, for
    Optuna's samplers carry state that a killed process takes along. A trial that such a process
    left without all its parameters is failed, and asked again to the same answer; one that it left
    without a result is handed out again.
    """

    def __init__(self, plan: StudyPlan, name: str, url: str | None = None) -> None:
        """Begin the study ``name`` or go on with it; without ``url`` (an RDB's), in memory.

        InputError for a database that does not answer, UnavailableError for what is not installed.
        """
        self._optuna = optuna = _import()
        self._plan, self._url = plan, url
        self._distributions = {
            key: optuna.distributions.FloatDistribution(least, most, log=log)
            for key, (least, most, log) in plan.ranges.items()
        }
        with self._database():
            self._storage = _storage(optuna, url)
            self._study = optuna.create_study(
                storage=self._storage, study_name=name, direction="maximize", load_if_exists=True
            )
            self._study_id = self._storage.get_study_id_from_name(name)
            self._fail_halves()

    def finished(self) -> list[tuple[Asked, Result]]:
        """Trials with their results."""
        return [
            (asked, Result(**trial.user_attrs["result"]))
            for asked, trial in self._trials()
            if trial.state.is_finished()
        ]

    def ask_until(self, end: int) -> list[Asked]:
        """Ask until ``end`` were asked in all; those that have no result yet."""
        for number in range(len(self._trials()), end):
            with self._database():
                self._ask(number)
        return [asked for asked, trial in self._trials() if not trial.state.is_finished()]

    def tell(self, asked: Asked, result: Result, value: float) -> None:
        """What the optimiser learns is ``value``; a trial that has one keeps it."""
        place = self._study_id, asked.trial_number
        with self._database():
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(*place)
            if not self._storage.get_trial(trial_id).state.is_finished():
                self._storage.set_trial_user_attr(trial_id, "result", vars(result))
            self._study.tell(asked.trial_number, value, skip_if_finished=True)

    def _trials(self) -> list[tuple[Asked, Any]]:
        """What was asked to the end, in order."""
        state = self._optuna.trial.TrialState
        with self._database():
            trials = self._study.get_trials(states=(state.RUNNING, state.COMPLETE))
        whole = [trial for trial in trials if self._is_whole(trial)]
        return [
            (Asked(number, trial.params, trial.number), trial)
            for number, trial in enumerate(sorted(whole, key=lambda trial: int(trial.number)))
        ]

    def _ask(self, number: int) -> None:
        starts, optuna = self._plan.starts, self._optuna
        if number < len(starts):
            start = optuna.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=dict(starts[number]),
                distributions=self._distributions,
            )
            self._study.add_trial(start)
            return
        seed = np.random.SeedSequence((self._plan.seed, number)).generate_state(1)[0]
        self._study.sampler = optuna.samplers.GPSampler(
            seed=int(seed), n_startup_trials=len(starts), warn_independent_sampling=False
        )
        self._study.ask(self._distributions)

    def _fail_halves(self) -> None:
        """End what a killed process had not asked to the end."""
        state = self._optuna.trial.TrialState
        for trial in self._study.get_trials(states=(state.RUNNING,)):
            if not self._is_whole(trial):
                self._study.tell(trial.number, state=state.FAIL)

    def _is_whole(self, trial: Any) -> bool:
        return bool(trial.params.keys() == self._distributions.keys())

    @contextmanager
    def _database(self) -> Iterator[None]:
        """Say of what the database does that the user can mend it; never its password."""
        if self._url is None:
            yield
            return
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except ImportError as error:
            cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
            package = DRIVERS.get(cause.name or "", f"SQLAlchemy's driver {cause.name or ''}")
            message = f"the database of --storage needs a driver: {cause}"
            raise UnavailableError(message, hint=f"pip install '{package}'") from error
        except (SQLAlchemyError, self._optuna.exceptions.StorageInternalError) as error:
            said = getattr(error.__cause__ or error, "orig", None) or error
            raise InputError(
                f"the database of --storage does not answer: {str(said).splitlines()[0]}",
                where=_without_password(self._url),
                hint=f"give a URL such as {URLS}; a study that began goes on from its trials",
            ) from error


def _import() -> Any:
    for late in ("scipy", "torch"):  # GPSampler imports them when it samples
        require(late, "search", "P-Sigmoid")
    optuna = require("optuna", "search", "P-Sigmoid")
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it warns where greenlet would be faster
    return optuna


def _storage(optuna: Any, url: str | None) -> Any:
    storages = optuna.storages
    return storages.InMemoryStorage() if url is None else storages.RDBStorage(url)


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return str(make_url(url).render_as_string(hide_password=True))
    except ArgumentError:
        return "--storage"
