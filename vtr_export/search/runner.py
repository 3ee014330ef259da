"""Ask a pool about candidates, shard by shard, no longer than it takes to know the verdict."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from math import fsum
from typing import Final, Protocol

import numpy as np

from vtr_export.search.candidate import Candidate, Space
from vtr_export.search.evaluator import Floats, Outcome, Shard, Unpruned
from vtr_export.search.ledger import Ledger, key_of
from vtr_export.search.pool import Pool, Task

SHARD_QUESTIONS: Final = 64
NOISE: Final = 1e-9  # a mean that is less than this below the floor reaches it
_MARGIN_DECIMALS: Final = 2  # what the noise of another machine leaves alone


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

    @property
    def missing(self) -> list[Shard]:
        return [shard for shard in self.shards if shard not in self.results]

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
    verdict. ``full_flops`` is :meth:`Evaluator.full_flops`.

    Counts: ``evaluations``, candidates asked about; ``computed`` and ``reused``, results (of a
    shard, or of a block unpruned) made here and found in the ledger. ``decoder_flops_spent`` is
    what these cost when they were made, wherever that was: a resumed search ends with the sum of
    an uninterrupted one. ``decoder_flops_naive`` is the price of answering all questions from
    layer 0 on, once unpruned and once for each of those candidates.
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
        self._shards: list[Shard] = []
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
        while not (hopeless := self._is_hopeless(answers, floor)) and answers.missing:
            self._submit(answers, 2 * self.pool.workers)
            for other in ahead:
                if len(self._flying) < self.pool.workers:
                    self._submit(self._answers_of(other), self.pool.workers)
            self._collect()
            self._report([answers])
        if hopeless:
            self._forget_all_but(ahead)
            return Measured(candidate, None, None, None, answers.seen)
        return self._measured(answers)

    def measure(self, candidates: Iterable[Candidate]) -> list[Measured]:
        """All of them whole, several at once where there are workers."""
        asked = [self._ask(candidate) for candidate in candidates]
        self._forget_all_but([answers.candidate for answers in asked])
        self._complete(asked)
        return [self._measured(answers) for answers in asked]

    def settle(self, candidate: Candidate, layer: int) -> None:
        """See :meth:`Evaluator.settle`; the pool hears of it when it is next given work."""
        self._settled = candidate, layer

    def _prepare(self) -> None:
        """Answer every block unpruned, and cut it into shards, hardest questions first."""
        if self._shards:
            return
        blocks = [
            Shard.of(i, tuple(range(len(hashes))), hashes) for i, hashes in enumerate(self._blocks)
        ]
        answers = self._answers[None] = self._known(None, blocks)
        self._complete([answers])
        results = [answers.results[block] for block in blocks]
        cut = [_cut(i, self._blocks[i], result) for i, result in enumerate(results)]
        self._shards = [shard for wave in zip_longest(*cut) for shard in wave if shard is not None]
        unpruned = self.space.unpruned()
        self.decoder_flops_naive += sum(self._full_flops(unpruned, block) for block in blocks)
        self._answers[unpruned] = _Answers(
            unpruned,
            self._shards,
            {
                shard: Outcome(
                    results[shard.block].metric[list(shard.rows)], np.zeros(len(shard)), 0
                )
                for shard in self._shards
            },
        )
        self._seconds, self._answered = 0.0, 0  # pruned answers come faster

    def _ask(self, candidate: Candidate) -> _Answers:
        self._prepare()
        if candidate not in self._asked:
            self._asked.add(candidate)
            self.evaluations += 1
            naive = (self._full_flops(candidate, shard) for shard in self._shards)
            self.decoder_flops_naive += sum(naive)
        return self._answers_of(candidate)

    def _answers_of(self, candidate: Candidate) -> _Answers:
        if candidate not in self._answers:
            self._answers[candidate] = self._known(candidate, self._shards)
        return self._answers[candidate]

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

    def _complete(self, asked: Sequence[_Answers]) -> None:
        self._report(asked)
        while waiting := [answers for answers in asked if answers.missing]:
            for answers in waiting:
                self._submit(answers, 2 * self.pool.workers)
            self._collect()
            self._report(asked)

    def _submit(self, answers: _Answers, limit: int) -> None:
        """Queue what is missing until ``limit`` tasks fly: one may wait behind each that runs."""
        for shard in answers.missing:
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
            self._flying.clear()  # what became of them is not known
            raise
        self._seconds += time.monotonic() - start
        self._answered += len(task.shard)
        self._flying.discard(task)
        answers = self._answers.get(task.candidate)
        if answers is None or task.shard in answers.results:  # asked twice
            return
        self._check(task, result)
        self.ledger.put(key_of(self.ledger.fingerprint, task.candidate, task.shard), result)
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

    def _measured(self, answers: _Answers) -> Measured:
        candidate = answers.candidate
        assert candidate is not None
        questions, kl = np.empty(self._questions), np.empty(self._questions)
        starts = np.cumsum([0, *map(len, self._blocks)])
        for shard, result in answers.results.items():
            assert isinstance(result, Outcome)
            places = starts[shard.block] + np.array(shard.rows)
            questions[places], kl[places] = result.metric, result.kl
        mean, mean_kl = fsum(questions) / len(questions), fsum(kl) / len(kl)
        return Measured(candidate, mean, mean_kl, questions, answers.seen)

    def _report(self, asked: Sequence[_Answers]) -> None:
        if not asked:
            return
        current = next((answers for answers in asked if answers.missing), asked[-1])
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


def _cut(block: int, hashes: Sequence[str], result: Outcome | Unpruned) -> list[Shard]:
    """The block's questions by their margin, in shards; the stored margin gives the same ones."""
    assert isinstance(result, Unpruned)
    order = np.argsort(np.round(result.margin, _MARGIN_DECIMALS), kind="stable").tolist()
    rows = [tuple(order[i : i + SHARD_QUESTIONS]) for i in range(0, len(order), SHARD_QUESTIONS)]
    return [Shard.of(block, some, tuple(hashes[row] for row in some)) for some in rows]
