"""A pool of Ray actors: each holds the model, and its share of the calibration set."""

import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from vtr_export.errors import InputError, UnavailableError, VtrError
from vtr_export.search.candidate import Candidate
from vtr_export.search.evaluator import Evaluator, Outcome, Unpruned
from vtr_export.search.workers.pool import Task, run
from vtr_export.search.workers.ray_cluster import Cluster, open_cluster, share_cores

CORES = 4  # of a worker, unless told how many workers there are
DEATHS = 3  # in a row, of one worker that finished nothing: it will not get better
WAIT_SECONDS = 1.0  # then look for workers that are late
PLACEMENT_SECONDS = 60.0  # until a worker must have found room on the cluster

Settled = tuple[Candidate, int]


@dataclass(frozen=True)
class Present:
    """A worker is up."""

    pid: int
    version: str


@dataclass(frozen=True)
class Failure:
    """What an evaluation raised: the user's mistake as it is, ours with its traceback."""

    mistake: VtrError | None
    report: str


class Worker:
    """The actor: one evaluator, loaded when the first task comes."""

    def __init__(
        self, make: Callable[[], Evaluator], threads: int, fingerprint: Mapping[str, str] | None
    ) -> None:
        self.make, self.threads, self.expected = make, threads, fingerprint
        self.evaluator: Evaluator | None = None
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is imported

    def present(self) -> Present:
        """Say that there was room."""
        return Present(os.getpid(), version("vtr-export"))

    def work(self, settled: tuple[Settled, ...], task: Task) -> Outcome | Unpruned | Failure:
        """Hear what was settled meanwhile, then run the task."""
        try:
            self.evaluator = evaluator = self.evaluator or self.load()
            for candidate, layer in settled:
                evaluator.settle(candidate, layer)
            return run(evaluator, task)
        except VtrError as error:
            return Failure(error, str(error))
        except Exception:
            return Failure(None, traceback.format_exc())

    def load(self) -> Evaluator:
        """The model, which must be the driver's own."""
        evaluator = self.make()
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(self.threads)
        here, there = self.expected, evaluator.fingerprint() if self.expected else None
        if here and there and dict(here) != dict(there):
            names = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
            raise InputError(
                f"a worker on {os.uname().nodename} does not hold the driver's model and questions:"
                f" they differ in {', '.join(names)}",
                where="--ray",
                hint="the same folders at the same paths on every node, and the same packages",
            )
        return evaluator


@dataclass
class Slot:
    """A place that an actor fills, and its successor when it dies."""

    actor: Any
    reference: Any  # of what the actor is asked: whether it is present, or a task
    since: float
    task: Task | None = None
    wanted: bool = True  # the task was not cancelled since
    present: Present | None = None
    heard: int = 0  # how many of the settled
    deaths: int = 0  # since it last finished a task
    queue: deque[Task] = field(default_factory=deque)
    heir: int | None = None  # who took over its blocks: the cluster has no room any more


class RayPool:
    """Runs tasks on Ray actors; see :class:`vtr_export.search.workers.pool.Pool`.

    A block belongs to one worker, so that what a worker holds of it stays of use. A worker that
    dies is replaced, hears again what was settled, and its unfinished task runs again.

    ``make`` is pickled and called once in every worker. ``address`` is a cluster's (``auto``,
    ``HOST:6379``, ``ray://HOST:10001``); without one, a cluster starts here and ends with the pool.
    ``workers`` are never more than ``blocks``; default: one a GPU, or one for every four cores.
    Each takes ``gpus_per_worker``; a fraction shares a GPU. ``fingerprint``, if given, is what
    their evaluators must have.

    UnavailableError says that there is no Ray, no such cluster, or no room on it.
    """

    def __init__(
        self,
        make: Callable[[], Evaluator],
        *,
        address: str | None,
        workers: int | None,
        blocks: int,
        gpus_per_worker: float = 0.0,
        fingerprint: Mapping[str, str] | None = None,
    ) -> None:
        self.cluster = open_cluster(address, workers)
        self.ray = self.cluster.ray
        self.settled: list[Settled] = []
        self.done: deque[tuple[Task, Outcome | Unpruned]] = deque()
        self.slots: list[Slot] = []
        try:
            count = min(workers or _default_workers(self.cluster, gpus_per_worker), blocks)
            cores = _cores(self.cluster, count, gpus_per_worker)
            actor = self.ray.remote(Worker).options(
                num_cpus=cores, num_gpus=gpus_per_worker, scheduling_strategy="SPREAD"
            )
            self._hire: Callable[[], Any] = lambda: actor.remote(make, cores, fingerprint)
            for _ in range(count):
                self.slots.append(self._filled())
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        """Tasks that run at once."""
        return sum(slot.heir is None for slot in self.slots)

    def submit(self, task: Task) -> None:
        """Queue a task for the worker that owns its block."""
        slot = self._owner(task.shard.block % len(self.slots))
        if slot.task == task:
            slot.wanted = True
        elif task not in slot.queue:  # one answer serves all who ask
            slot.queue.append(task)
            self._assign(slot)

    def collect(self) -> tuple[Task, Outcome | Unpruned]:
        """Wait for a task to finish.

        A VtrError of an evaluator is raised as it is, any other of its errors as a RuntimeError
        with the worker's traceback; UnavailableError if workers die again and again.
        """
        self._give_out()
        while not self.done:
            if not any(slot.task or slot.queue for slot in self.slots):
                raise IndexError("nothing was submitted")
            self._harvest()
            if not self.done:  # else who asked may cancel what waits
                self._give_out()
        return self.done.popleft()

    def cancel(self, candidate: Candidate) -> None:
        """Forget the candidate's tasks that did not start."""
        for slot in self.slots:
            slot.queue = deque(task for task in slot.queue if task.candidate != candidate)
            slot.wanted = slot.wanted and (slot.task is None or slot.task.candidate != candidate)

    def settle(self, candidate: Candidate, layer: int) -> None:
        """Every worker hears of it before its next task."""
        self.settled.append((candidate, layer))

    def close(self) -> None:
        """End the workers, and the cluster if it is our own."""
        for slot in self.slots:
            with suppress(Exception):  # dead already
                self.ray.kill(slot.actor)
        self.slots = []
        self.cluster.close()

    def _owner(self, place: int) -> Slot:
        slot = self.slots[place]
        return slot if slot.heir is None else self._owner(slot.heir)

    def _filled(self) -> Slot:
        actor = self._hire()
        return Slot(actor, actor.present.remote(), time.monotonic())

    def _give_out(self) -> None:
        for slot in self.slots:
            self._assign(slot)

    def _assign(self, slot: Slot) -> None:
        """Give a worker that is idle its next task."""
        if slot.reference is None and slot.queue:
            slot.task, slot.wanted = slot.queue.popleft(), True
            news, slot.heard = tuple(self.settled[slot.heard :]), len(self.settled)
            slot.reference = slot.actor.work.remote(news, slot.task)

    def _harvest(self) -> None:
        """Wait for something to finish, and take all that is."""
        busy = {slot.reference: slot for slot in self.slots if slot.reference is not None}
        some = self.ray.wait(list(busy), num_returns=1, timeout=WAIT_SECONDS)[0]
        for reference in some and self.ray.wait(list(busy), num_returns=len(busy), timeout=0)[0]:
            self._finish(busy[reference])
        self._make_room()

    def _finish(self, slot: Slot) -> None:
        reference, slot.reference = slot.reference, None
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise RuntimeError(str(error)) from None
        except self.ray.exceptions.RayError as death:
            self._replace(slot, str(death))
            return
        task, slot.task = slot.task, None
        if isinstance(result, Present):
            slot.present = _same_version(result)
        elif task is not None and not isinstance(result, Failure):
            self.done.append((task, result))
            slot.deaths = 0
        if isinstance(result, Failure):
            raise result.mistake or RuntimeError(f"a worker failed:\n{result.report}")

    def _replace(self, slot: Slot, reason: str) -> None:
        """Put a new worker in a dead one's place, with its unfinished task."""
        slot.deaths += 1
        if slot.deaths >= DEATHS:
            said = self.cluster.last_words(slot.present.pid if slot.present else None)
            raise UnavailableError(
                f"a worker died {DEATHS} times without finishing anything:"
                f" {_told(reason)}{said and chr(10) + said}",
                where="--ray",
                hint="if memory ran out: fewer --workers; what was measured is kept in the ledger",
            )
        with suppress(Exception):  # unreachable rather than dead: it must not go on
            self.ray.kill(slot.actor)
        if slot.task is not None and slot.wanted:
            slot.queue.appendleft(slot.task)
        new = self._filled()
        slot.actor, slot.reference, slot.since = new.actor, new.reference, new.since
        slot.task, slot.present, slot.heard = None, None, 0

    def _make_room(self) -> None:
        """Blocks of a worker that found no place go to one that did."""
        for slot in self.slots:
            late = time.monotonic() - slot.since > PLACEMENT_SECONDS
            if slot.heir is not None or slot.present is not None or not late:
                continue
            heirs = [i for i, other in enumerate(self.slots) if other.present is not None]
            if not heirs:
                raise UnavailableError(
                    f"no worker found a place on the cluster within {PLACEMENT_SECONDS:g} s;"
                    f" free are {self.ray.available_resources()}",
                    where="--ray",
                    hint="ray status shows who takes the rest; --workers asks for fewer",
                )
            slot.heir, slot.reference = min(heirs, key=lambda i: len(self.slots[i].queue)), None
            heir = self.slots[slot.heir]
            heir.queue.extend(slot.queue)
            slot.queue.clear()
            self.ray.kill(slot.actor)


def _default_workers(cluster: Cluster, gpus: float) -> int:
    """One a GPU, or one for every four cores."""
    nodes = cluster.nodes()
    if gpus:
        return max(1, sum(int(node.gpus // gpus) for node in nodes))
    return max(1, sum(int(node.cpus // CORES) for node in nodes))


def _cores(cluster: Cluster, workers: int, gpus: float) -> int:
    nodes = cluster.nodes()
    if cores := share_cores(nodes, workers, gpus):
        return cores
    has = f"{sum(n.cpus for n in nodes):g} CPUs and {sum(n.gpus for n in nodes):g} GPUs"
    raise UnavailableError(
        f"{workers} workers of 1 CPU and {gpus:g} GPUs do not fit on {len(nodes)} nodes with {has}",
        where="--ray",
        hint="--workers asks for fewer; ray start --address=HOST:6379 on a machine adds it",
    )


def _same_version(present: Present) -> Present:
    here = version("vtr-export")
    if present.version != here:
        raise UnavailableError(
            f"the cluster's nodes have vtr-export {present.version}, this is {here}",
            where="--ray",
            hint=f"pip install vtr-export=={here} on every node",
        )
    return present


def _told(reason: str) -> str:
    """Ray's reason, without the actor's names and the general advice."""
    text = " ".join(line for line in reason.splitlines() if not line.startswith("\t"))
    return text.partition(" Some common causes")[0]
