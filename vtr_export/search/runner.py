"""Ask a pool about candidates, shard by shard, no longer than it takes to know the verdict."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import fsum
from typing import Final, Protocol

import numpy as np

from vtr_export.search.candidate import Candidate, Space
from vtr_export.search.evaluator import Floats, Outcome, Shard, Unpruned
from vtr_export.search.ledger.ledger import Ledger, key_of
from vtr_export.search.order import Order
from vtr_export.search.workers.pool import Pool, Task

NOISE: Final = 1e-9  # a mean that is less than this below the floor reaches it


class Bounded(Protocol):
    """Of a metric, what matters here."""

    @property
    def best(self) -> float:
        """No question scores higher."""
        ...


@dataclass(frozen=True)
class Measured:
    """What became of a candidate; ``metric`` is None where it was abandoned below the floor.

    ``metric`` and ``kl`` (nats) are means over all questions, ``questions`` is the metric of each
    in the set's order. ``seen`` questions were answered.
    """

    candidate: Candidate
    metric: float | None
    kl: float | None
    questions: Floats | None
    seen: int


@dataclass(frozen=True)
class Progress:
    """``done`` of the ``total`` questions of the last call are answered.

    ``metric`` is the mean over those of ``candidate``, None before the first. ``eta_s`` is None
    until something was computed, and covers the candidates that the search still expects.
    """

    done: int
    total: int
    candidate: Candidate
    metric: float | None
    eta_s: float | None


@dataclass
class _Answers:
    """What is known of a candidate, or of the unpruned pass over whole blocks (None)."""

    candidate: Candidate | None
    shards: Sequence[Shard]  # in the order they are asked in
    results: dict[Shard, Outcome | Unpruned] = field(default_factory=dict)

    def missing(self, blocks: int | None = None) -> list[Shard]:
        """Shards, of the first ``blocks``, without a result."""
        return [
            shard
            for shard in self.shards
            if shard not in self.results and (blocks is None or shard.block < blocks)
        ]

    @property
    def scores(self) -> list[float]:
        return [float(score) for result in self.results.values() for score in result.metric]

    @property
    def seen(self) -> int:
        return sum(map(len, self.results))


class Runner:
    """Measures candidates on blocks of questions, given by their hashes.

    A result in the ledger is not computed again, and a new one is there before the next is waited
    for. Neither the order of questions, nor the number of workers, nor early stopping changes a
    verdict. ``full_flops`` prices a shard from layer 0 on (``evaluators.work.Naive``).

    Counts: ``evaluations``, candidates asked about; ``computed`` and ``reused``, results (of a
    shard, or of a block unpruned) made here and found in the ledger. ``decoder_flops_spent`` is
    what these cost when they were made, wherever that was: a resumed search ends with the sum of
    an uninterrupted one, and what evaluators had to make anew of what they held.
    ``decoder_flops_naive`` is the price of answering all questions from layer 0 on, once unpruned
    and once for each of those candidates.
    """

    def __init__(
        self,
        pool: Pool,
        space: Space,
        full_flops: Callable[[Candidate, Shard], int],
        blocks: Sequence[Sequence[str]],
        metric: Bounded,
        ledger: Ledger,
        progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.pool, self.space, self.ledger = pool, space, ledger
        self.expected = 0  # candidates that a search still expects to ask about, for the ETA
        self.evaluations = self.computed = self.reused = 0
        self.decoder_flops_spent = self.decoder_flops_naive = 0
        self._full_flops, self._best, self._progress = full_flops, metric.best, progress
        self._blocks = [tuple(block) for block in blocks]
        self._questions = sum(map(len, blocks))
        self._set = Shard.of(0, (), tuple(chain(*blocks))).sha256[:16]
        self._order: Order | None = None
        self._learned = set[tuple[Candidate, Shard]]()
        self._answers: dict[Candidate | None, _Answers] = {}
        self._asked = set[Candidate]()
        self._flying = set[Task]()
        self._settled: tuple[Candidate, int] | None = None
        self._seconds, self._answered = 0.0, 0  # waited for how many questions

    def unpruned(self) -> Measured:
        """The mean metric when nothing is dropped, and each question's."""
        self._prepare()
        return self._measured(self._answers_of(self.space.unpruned()))

    def judge(
        self, candidate: Candidate, floor: float, ahead: Sequence[Candidate] = ()
    ) -> Measured:
        """Measure ``candidate`` whole, or abandon it once its mean cannot reach ``floor``.

        Workers that would be idle begin with ``ahead``, which may be asked next.
        """
        answers = self._ask(candidate)
        self._forget_all_but({candidate, *ahead})
        self._report([answers])
        while not (hopeless := self._is_hopeless(answers, floor)) and answers.missing():
            self._submit(answers, 2 * self.pool.workers)
            for other in ahead:
                if len(self._flying) < self.pool.workers:
                    self._submit(self._answers_of(other), self.pool.workers)
            self._collect()
            self._report([answers])
        self._learn([answers])
        if hopeless:
            self._forget_all_but({*ahead} - {candidate})
            return Measured(candidate, None, None, None, answers.seen)
        return self._measured(answers)

    def measure(self, candidates: Iterable[Candidate], blocks: int | None = None) -> list[Measured]:
        """All of them, several at once where there are workers; ``blocks``: on the first alone."""
        asked = [self._ask(candidate, blocks) for candidate in candidates]
        self._forget_all_but([answers.candidate for answers in asked])
        self._complete(asked, blocks)
        self._learn(asked)
        return [self._measured(answers, blocks) for answers in asked]

    def known(self) -> list[Measured]:
        """Every candidate that was measured whole."""
        found = [self.measured(candidate) for candidate in self._answers if candidate is not None]
        return [one for one in found if one is not None]

    def measured(self, candidate: Candidate | None) -> Measured | None:
        """What is known of a candidate that was measured whole; nothing is computed."""
        answers = self._answers.get(candidate) if candidate is not None else None
        return None if answers is None or answers.missing() else self._measured(answers)

    def settle(self, candidate: Candidate, layer: int) -> None:
        """See :meth:`Evaluator.settle`; the pool hears of it when it is next given work."""
        self._settled = candidate, layer

    def _prepare(self) -> None:
        """Answer every block unpruned: the margins order what candidates are asked."""
        if self._order is not None:
            return
        blocks = [
            Shard.of(i, tuple(range(len(hashes))), hashes) for i, hashes in enumerate(self._blocks)
        ]
        answers = self._answers[None] = self._known(None, blocks)
        self._complete([answers])
        results = [answers.results[block] for block in blocks]
        self._order = Order(self._blocks, results)  # type: ignore[arg-type]  # blocks' are Unpruned
        unpruned = self.space.unpruned()
        self.decoder_flops_naive += sum(self._full_flops(unpruned, block) for block in blocks)
        whole = {
            block: Outcome(result.metric, np.zeros(len(block)), 0)
            for block, result in zip(blocks, results, strict=True)
        }
        self._answers[unpruned] = _Answers(unpruned, blocks, dict(whole))
        self._seconds, self._answered = 0.0, 0  # pruned answers come faster

    def _ask(self, candidate: Candidate, blocks: int | None = None) -> _Answers:
        self._prepare()
        answers = self._answers_of(candidate)
        if candidate not in self._asked:
            self._asked.add(candidate)
            self.evaluations += 1
            shards = [each for each in answers.shards if blocks is None or each.block < blocks]
            self.decoder_flops_naive += sum(self._full_flops(candidate, each) for each in shards)
        return answers

    def _answers_of(self, candidate: Candidate) -> _Answers:
        """In the order that was best when it was first asked about."""
        if candidate not in self._answers:
            assert self._order is not None, "prepared"
            name = f"lost before {candidate.key()} on {self._set}"
            noted = self.ledger.noted(name)
            if noted is None:
                self.ledger.note(name, noted := [list(item) for item in self._order.lost.items()])
            shards = self._order.shards(dict(noted))
            self._answers[candidate] = self._known(candidate, shards)
        return self._answers[candidate]

    def _learn(self, asked: Sequence[_Answers]) -> None:
        """Which questions were lost; later candidates are asked these first."""
        assert self._order is not None, "prepared"
        for answers in asked:
            for shard, result in answers.results.items():
                known = answers.candidate, shard
                if answers.candidate is not None and known not in self._learned:
                    self._learned.add((answers.candidate, shard))
                    self._order.learn(shard, result.metric)

    def _known(self, candidate: Candidate | None, shards: Sequence[Shard]) -> _Answers:
        """With what the ledger has."""
        answers = _Answers(candidate, shards)
        stored = self.ledger.get_unpruned if candidate is None else self.ledger.get
        for shard in shards:
            result = stored(key_of(self.ledger.fingerprint, candidate, shard))
            if result is not None:
                answers.results[shard] = result
                self.reused += 1
                self.decoder_flops_spent += result.decoder_flops
        return answers

    def _complete(self, asked: Sequence[_Answers], blocks: int | None = None) -> None:
        self._report(asked)
        while waiting := [answers for answers in asked if answers.missing(blocks)]:
            for answers in waiting:
                self._submit(answers, 2 * self.pool.workers, blocks)
            self._collect()
            self._report(asked)

    def _submit(self, answers: _Answers, limit: int, blocks: int | None = None) -> None:
        """Queue what is missing until ``limit`` tasks fly: one may wait behind each that runs."""
        for shard in answers.missing(blocks):
            task = Task(shard, answers.candidate)
            if len(self._flying) >= limit:
                return
            if task in self._flying:
                continue
            if self._settled is not None:
                self.pool.settle(*self._settled)
                self._settled = None
            self.pool.submit(task)
            self._flying.add(task)

    def _collect(self) -> None:
        """Wait for one result, of whatever candidate, and keep it."""
        start = time.monotonic()
        try:
            task, result = self.pool.collect()
        except BaseException:
            self._forget_all_but(())  # what became of them is not known
            raise
        self._seconds += time.monotonic() - start
        self._answered += len(task.shard)
        self._flying.discard(task)
        self._check(task, result)
        self.ledger.put(key_of(self.ledger.fingerprint, task.candidate, task.shard), result)
        answers = self._answers.get(task.candidate)
        if answers is not None and task.shard in answers.missing():  # else late, or not ours
            answers.results[task.shard] = result
            self.computed += 1
            self.decoder_flops_spent += result.decoder_flops

    def _check(self, task: Task, result: Outcome | Unpruned) -> None:
        """An early verdict is only as good as the metric's bound."""
        bounded = bool((result.metric <= self._best + NOISE).all())  # not so for NaN
        if result.metric.shape != (len(task.shard),) or not bounded:
            raise ValueError(f"{task} was answered by {result.metric=}")

    def _forget_all_but(self, candidates: Iterable[Candidate | None]) -> None:
        kept = set(candidates)
        for candidate in {task.candidate for task in self._flying} - kept:
            if candidate is not None:
                self.pool.cancel(candidate)
        self._flying = {task for task in self._flying if task.candidate in kept}

    def _is_hopeless(self, answers: _Answers, floor: float) -> bool:
        """Even with the best scores for what is missing, the mean stays below the floor."""
        scores = answers.scores
        rest = self._best * (self._questions - len(scores))
        return fsum([*scores, rest]) < (floor - NOISE) * self._questions

    def _measured(self, answers: _Answers, blocks: int | None = None) -> Measured:
        """Of all blocks or the first ``blocks``, whatever else is known."""
        candidate, results = answers.candidate, answers.results.items()
        assert candidate is not None
        questions, kl = np.empty((2, self._questions))
        starts, seen = np.cumsum([0, *map(len, self._blocks)]), list[int]()
        for shard, result in results:
            if isinstance(result, Outcome) and (blocks is None or shard.block < blocks):
                places = (starts[shard.block] + np.array(shard.rows)).tolist()
                questions[places], kl[places] = result.metric, result.kl
                seen += places
        seen.sort()
        mean, mean_kl = fsum(questions[seen]) / len(seen), fsum(kl[seen]) / len(seen)
        return Measured(candidate, mean, mean_kl, questions[seen], len(seen))

    def _report(self, asked: Sequence[_Answers]) -> None:
        if not asked:
            return
        current = next((answers for answers in asked if answers.missing()), asked[-1])
        done = sum(answers.seen for answers in asked)
        total = self._questions * len(asked)
        metric = fsum(current.scores) / current.seen if current.seen else None
        candidate = current.candidate or self.space.unpruned()
        self._progress(Progress(done, total, candidate, metric, self._eta_s(total - done)))

    def _eta_s(self, questions: int) -> float | None:
        """The pace so far, on these and on as many a candidate as were needed so far."""
        if not self._answered:
            return None
        seen = [self._answers[candidate].seen for candidate in self._asked]
        questions += round(self.expected * sum(seen) / max(1, len(seen)))
        return questions * self._seconds / self._answered
