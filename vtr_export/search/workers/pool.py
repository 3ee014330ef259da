"""Where evaluations run: here, or on workers that each hold the model."""

from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

from vtr_export.search.candidate import Candidate
from vtr_export.search.evaluator import Evaluator, Outcome, Shard, Unpruned


@dataclass(frozen=True)
class Task:
    """One evaluation; without a candidate, the block of ``shard`` is answered unpruned."""

    shard: Shard
    candidate: Candidate | None


class Pool(Protocol):
    """Runs tasks in any order, each to its end or not at all."""

    @property
    def workers(self) -> int:
        """Tasks that run at once."""
        ...

    def submit(self, task: Task) -> None:
        """Queue a task."""
        ...

    def collect(self) -> tuple[Task, Outcome | Unpruned]:
        """Wait for a submitted task to finish. A worker's death is the pool's affair."""
        ...

    def cancel(self, candidate: Candidate) -> None:
        """Forget the candidate's tasks that did not start; results of others may still come."""
        ...

    def settle(self, candidate: Candidate, layer: int) -> None:
        """See :meth:`Evaluator.settle`."""
        ...

    def close(self) -> None:
        """Give back what it took."""
        ...


class Inline:
    """One evaluator in this process; a task runs when it is collected."""

    workers = 1

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.queue: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        """Queue a task."""
        self.queue.append(task)

    def collect(self) -> tuple[Task, Outcome | Unpruned]:
        """Run the task that waited longest."""
        task = self.queue.popleft()
        return task, run(self.evaluator, task)

    def cancel(self, candidate: Candidate) -> None:
        """Forget the candidate's tasks."""
        self.queue = deque(task for task in self.queue if task.candidate != candidate)

    def settle(self, candidate: Candidate, layer: int) -> None:
        """See :meth:`Evaluator.settle`."""
        self.evaluator.settle(candidate, layer)

    def close(self) -> None:
        """Nothing was taken."""


def run(evaluator: Evaluator, task: Task) -> Outcome | Unpruned:
    """What a worker does with a task."""
    if task.candidate is None:
        return evaluator.unpruned(task.shard.block)
    return evaluator.evaluate(task.candidate, task.shard)


class Part:
    """A pool's blocks from ``first`` on, counted from 0: one model serves two sets."""

    def __init__(self, pool: Pool, first: int) -> None:
        self.pool, self.first = pool, first

    @property
    def workers(self) -> int:
        """Tasks that run at once."""
        return self.pool.workers

    def submit(self, task: Task) -> None:
        """Queue a task."""
        self.pool.submit(self._moved(task, self.first))

    def collect(self) -> tuple[Task, Outcome | Unpruned]:
        """Wait for a submitted task to finish."""
        task, result = self.pool.collect()
        return self._moved(task, -self.first), result

    def cancel(self, candidate: Candidate) -> None:
        """Forget the candidate's tasks that did not start."""
        self.pool.cancel(candidate)

    def settle(self, candidate: Candidate, layer: int) -> None:
        """See :meth:`Evaluator.settle`."""
        self.pool.settle(candidate, layer)

    def close(self) -> None:
        """Whoever opened the pool closes it."""

    def _moved(self, task: Task, by: int) -> Task:
        return replace(task, shard=replace(task.shard, block=task.shard.block + by))
