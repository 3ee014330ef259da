"""A whole search on a model that is a formula; ``python synthetic_search.py LEDGER`` runs one."""

import hashlib
import json
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vtr_export.families import ModelFacts
from vtr_export.search.candidate import Candidate, Score, Space
from vtr_export.search.evaluator import Evaluator, Outcome, Shard, Unpruned
from vtr_export.search.gsearch import gsearch, levels_of
from vtr_export.search.ledger.ledger import Ledger
from vtr_export.search.runner import Progress, Runner
from vtr_export.search.workers.pool import Inline, Pool, Task, run

LAYERS, PARTS = 4, 32
SCORE = Score()
FACTS = ModelFacts(
    model_type="synthetic",
    layers=LAYERS,
    hidden=8,
    heads=2,
    kv_heads=2,
    head_dim=4,
    intermediate=16,
    gated=True,
    vocab=32,
    context=64,
    tied=False,
    dtype="float32",
    tokens_per_image=PARTS,
    image_token_id=4,
    vision=None,
    projector_parameters=0,
    projector_macs=0,
)
SPACE = Space(FACTS)


@contextmanager
def quick_folder() -> Iterator[Path]:
    """In memory where there is such a place: a kill is not a power cut, and disks are slow."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def uniform(*what: object) -> float:
    """In [0, 1), from a hash: the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:6]) / 2**48


def blocks_of(questions: int, block: int = 256) -> list[tuple[str, ...]]:
    names = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(questions)]
    return [tuple(names[i : i + block]) for i in range(0, questions, block)]


@dataclass
class Synthetic:
    """A question is answered as long as every layer keeps the tokens that it needs there.

    Needs fall with depth. ``noise`` is the share of questions that answer by chance instead, which
    breaks monotonicity. ``heard`` is told of every result, before anybody else.
    """

    blocks: Sequence[Sequence[str]]
    noise: float = 0.0
    fractions: bool = False
    delay_s: float = 0.0
    heard: Callable[[Task], None] = lambda task: None
    tasks: list[Task] = field(default_factory=list)

    best = 1.0
    space = SPACE

    def fingerprint(self) -> Mapping[str, str]:
        return {"model": "synthetic", "noise": str(self.noise), "metric": "exact/1"}

    def score(self, candidate: Candidate, question: str) -> float:
        worth = uniform(question, "worth") if self.fractions else 1.0
        if candidate.is_unpruned:
            return worth * (uniform(question, "known") < 0.9)
        if uniform(question, "noisy") < self.noise:
            return worth * (uniform(question, candidate.key()) < 0.9)
        hard = uniform(question, "hard") ** 3
        enough = all(k >= PARTS * hard * 0.7**layer for layer, k in enumerate(candidate.keeps))
        return worth * (enough and uniform(question, "known") < 0.9)

    def unpruned(self, block: int) -> Unpruned:
        questions = self.blocks[block]
        metric = [self.score(SPACE.unpruned(), question) for question in questions]
        margin = [1 - uniform(question, "hard") for question in questions]
        shard = whole(block, questions)
        self._answered(Task(shard, None))
        return Unpruned(np.array(metric), np.array(margin), full_flops(SPACE.unpruned(), shard))

    def settle(self, candidate: Candidate, layer: int) -> None:
        self.settled = candidate, layer

    def evaluate(self, candidate: Candidate, shard: Shard) -> Outcome:
        questions = [self.blocks[shard.block][row] for row in shard.rows]
        metric = [self.score(candidate, question) for question in questions]
        kl = [uniform(question, candidate.key(), "kl") for question in questions]
        self._answered(Task(shard, candidate))
        return Outcome(np.array(metric), np.array(kl), full_flops(candidate, shard) // 2)

    def _answered(self, task: Task) -> None:
        time.sleep(self.delay_s)
        self.tasks.append(task)
        self.heard(task)


def whole(block: int, questions: Sequence[str]) -> Shard:
    return Shard.of(block, tuple(range(len(questions))), tuple(questions))


def full_flops(candidate: Candidate, shard: Shard) -> int:
    return sum(candidate.keeps) * len(shard)


class Shuffled:
    """Several workers that finish in any order; a block belongs to one of them."""

    def __init__(self, evaluator: Evaluator, workers: int, seed: int) -> None:
        self.evaluator, self.workers = evaluator, workers
        self.random = random.Random(seed)
        self.queues = [deque[Task]() for _ in range(workers)]
        self.running: dict[int, Task] = {}
        self.idle_while_work_waits = 0

    def submit(self, task: Task) -> None:
        self.queues[task.shard.block % self.workers].append(task)
        self._start()

    def collect(self) -> tuple[Task, Outcome | Unpruned]:
        assert self.running, "nothing was submitted"
        worker = self.random.choice(sorted(self.running))
        task = self.running.pop(worker)
        self._start()
        return task, run(self.evaluator, task)

    def cancel(self, candidate: Candidate) -> None:
        self.queues = [deque(t for t in queue if t.candidate != candidate) for queue in self.queues]

    def settle(self, candidate: Candidate, layer: int) -> None:
        self.evaluator.settle(candidate, layer)

    def close(self) -> None: ...

    def _start(self) -> None:
        for worker, queue in enumerate(self.queues):
            if queue and worker not in self.running:
                self.running[worker] = queue.popleft()


def runner_of(
    evaluator: Synthetic,
    ledger: Ledger,
    pool: Pool | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Runner:
    return Runner(
        pool or Inline(evaluator),
        SPACE,
        full_flops,
        evaluator.blocks,
        evaluator,
        ledger,
        progress,
    )


def search(runner: Runner, tolerance: float = 0.02, step: int = 4) -> dict[str, Any]:
    """G-Search; what a user is told of it."""
    unpruned = runner.unpruned().metric
    assert unpruned is not None
    floor = unpruned - tolerance
    found = gsearch(runner, SPACE, SCORE, floor=lambda layer: floor, levels=levels_of(PARTS, step))
    best = runner.judge(found.candidate, floor)
    return {
        "schedule": list(found.candidate.keeps),
        "metric": best.metric,
        "kl": best.kl,
        "unpruned_metric": unpruned,
        "evaluations": runner.evaluations,
        "decoder_flops_spent": runner.decoder_flops_spent,
        "decoder_flops_naive": runner.decoder_flops_naive,
        "violations": len(found.violations()),
    }


def search_on(path: Path, evaluator: Synthetic, tolerance: float = 0.02) -> dict[str, Any]:
    with Ledger.open(path, evaluator.fingerprint()) as ledger:
        return search(runner_of(evaluator, ledger), tolerance)


def main() -> None:
    """``LEDGER [QUESTIONS [MILLISECONDS]]``: one search; the last line of stdout is its JSON."""
    path, *numbers = sys.argv[1:]
    questions, delay_ms = (*map(int, numbers), *(300, 1)[len(numbers) :])
    evaluator = Synthetic(blocks_of(questions, 128), noise=0.1, delay_s=delay_ms / 1000)
    print(json.dumps(search_on(Path(path), evaluator)))


if __name__ == "__main__":
    main()
