"""What a runner says of candidates is what full evaluation says, whoever computes it and when."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_search import (
    LAYERS,
    PARTS,
    SCORE,
    SPACE,
    Shuffled,
    Synthetic,
    blocks_of,
    full_flops,
    quick_folder,
    runner_of,
    search,
    uniform,
    whole,
)

from vtr_export.search.candidate import Candidate
from vtr_export.search.evaluator import Outcome, Shard
from vtr_export.search.ledger.ledger import Ledger
from vtr_export.search.runner import Measured, Progress, Runner
from vtr_export.search.workers.pool import Part, Task


def candidate(*keeps: int) -> Candidate:
    return Candidate((PARTS, *keeps), SCORE, PARTS)


candidates = st.lists(st.integers(0, PARTS), min_size=LAYERS - 1, max_size=LAYERS - 1).map(
    lambda keeps: candidate(*sorted(keeps, reverse=True))
)
evaluators = st.builds(
    lambda questions, block, noise, fractions: Synthetic(
        blocks_of(questions, block), noise, fractions
    ),
    st.integers(1, 400),
    st.integers(1, 256),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.booleans(),
)


def scores(evaluator: Synthetic, candidate: Candidate) -> list[float]:
    return [evaluator.score(candidate, q) for block in evaluator.blocks for q in block]


def mean(evaluator: Synthetic, candidate: Candidate) -> float:
    return float(np.mean(scores(evaluator, candidate)))


def in_new_ledger(evaluator: Synthetic, act: Callable[[Ledger], None]) -> None:
    with (
        quick_folder() as folder,
        Ledger.open(folder / "ledger", evaluator.fingerprint()) as ledger,
    ):
        act(ledger)


def is_whole(evaluator: Synthetic, measured: Measured) -> bool:
    """Its numbers are those of full evaluation, in the set's order."""
    asked, candidate = [q for block in evaluator.blocks for q in block], measured.candidate
    divergence = [uniform(q, candidate.key(), "kl") for q in asked]
    assert measured.metric is not None
    assert measured.kl is not None
    assert measured.questions is not None
    return (
        measured.questions.tolist() == scores(evaluator, candidate)
        and abs(measured.metric - mean(evaluator, candidate)) < 1e-12
        and abs(measured.kl - (0 if candidate.is_unpruned else np.mean(divergence))) < 1e-12
        and measured.seen == len(asked)
    )


@given(
    evaluators,
    st.lists(candidates, min_size=1, max_size=5),
    st.integers(0, 4),
    st.integers(0, 99),
    st.data(),
)
@settings(max_examples=60)
def test_verdicts_are_those_of_full_evaluation(
    evaluator: Synthetic, asked: list[Candidate], workers: int, seed: int, data: st.DataObject
) -> None:
    """A floor may be met exactly, or but for noise; zero workers are an evaluator here."""
    exact = [mean(evaluator, one) for one in asked]
    close = [one + 5e-10 for one in exact]
    floors = [data.draw(st.floats(0, 1) | st.sampled_from(exact + close)) for _ in asked]

    def judge(ledger: Ledger) -> None:
        pool = Shuffled(evaluator, workers, seed) if workers else None
        runner = runner_of(evaluator, ledger, pool)
        for i, (one, its_mean, floor) in enumerate(zip(asked, exact, floors, strict=True)):
            measured = runner.judge(one, floor, asked[i + 1 :])
            assert (measured.metric is not None) == (its_mean >= floor - 1e-9)
            assert measured.metric is None or is_whole(evaluator, measured)
        assert runner.computed == len(set(evaluator.tasks))
        if len(set(asked)) == len(asked):  # what runs when it is abandoned may be asked again
            assert runner.computed == len(evaluator.tasks)
        assert runner.evaluations == len(set(asked))
        assert ledger.evaluations == runner.computed - len(evaluator.blocks)

    in_new_ledger(evaluator, judge)


@given(evaluators, st.lists(candidates, min_size=1, max_size=5), st.integers(1, 4))
@settings(max_examples=30)
def test_candidates_are_measured_whole_and_at_once(
    evaluator: Synthetic, asked: list[Candidate], workers: int
) -> None:
    def measure(ledger: Ledger) -> None:
        runner = runner_of(evaluator, ledger, Shuffled(evaluator, workers, 0))
        measured = runner.measure(asked)
        assert [one.candidate for one in measured] == asked
        assert all(is_whole(evaluator, one) for one in [*measured, runner.unpruned()])
        again = runner_of(evaluator, ledger)
        before = len(evaluator.tasks)
        assert [one.metric for one in again.measure(asked)] == [one.metric for one in measured]
        assert len(evaluator.tasks) == before
        assert again.measure([]) == []

    in_new_ledger(evaluator, measure)


@given(evaluators, st.lists(candidates, min_size=1, max_size=4), st.floats(0, 1))
@settings(max_examples=60)
def test_nothing_is_asked_that_cannot_change_the_verdict(
    evaluator: Synthetic, asked: list[Candidate], floor: float
) -> None:
    """After every shard but the last one, the rest could still have reached the floor."""

    def judge(ledger: Ledger) -> None:
        runner = runner_of(evaluator, ledger)
        questions = sum(map(len, evaluator.blocks))
        runner.unpruned()
        for one in dict.fromkeys(asked):
            before = len(evaluator.tasks)
            runner.judge(one, floor, asked)
            shards = [task.shard for task in evaluator.tasks[before:]]
            assert all(task.candidate == one for task in evaluator.tasks[before:])
            lost = [
                len(shard)
                - fsum(
                    evaluator.score(one, evaluator.blocks[shard.block][row]) for row in shard.rows
                )
                for shard in shards[:-1]
            ]
            assert questions - fsum(lost) >= (floor - 2e-9) * questions

    in_new_ledger(evaluator, judge)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def ledger(tmp_path: Path, evaluator: Synthetic) -> Any:
    with Ledger.open(tmp_path / "ledger", evaluator.fingerprint()) as ledger:
        yield ledger


@pytest.fixture
def evaluator() -> Synthetic:
    return Synthetic(blocks_of(600, 256), noise=0.1)


def test_a_hopeless_candidate_is_abandoned_early(evaluator: Synthetic, ledger: Ledger) -> None:
    runner = runner_of(evaluator, ledger)
    floor = runner.unpruned().metric
    assert floor is not None
    measured = runner.judge(candidate(0, 0, 0), floor - 0.02)
    assert measured == Measured(candidate(0, 0, 0), None, None, None, measured.seen)
    assert 0 < measured.seen < 300
    assert runner.decoder_flops_spent < runner.decoder_flops_naive


def test_shards_are_the_block_s_questions_hardest_first(
    evaluator: Synthetic, ledger: Ledger
) -> None:
    runner_of(evaluator, ledger).measure([candidate(9, 9, 9)])
    shards = [task.shard for task in evaluator.tasks if task.candidate is not None]
    assert [shard.block for shard in shards[:4]] == [0, 1, 2, 0]  # a wave, and the next
    for block, questions in enumerate(evaluator.blocks):
        own = [shard for shard in shards if shard.block == block]
        rows = [row for shard in own for row in shard.rows]
        assert sorted(rows) == list(range(len(questions)))
        assert all(len(shard) <= 64 for shard in own)
        margin = [round(1 - uniform(questions[row], "hard"), 2) for row in rows]
        assert all(a <= b for a, b in pairwise(margin))
        assert own == [Shard.of(block, s.rows, tuple(questions[r] for r in s.rows)) for s in own]


def test_part_of_the_set_is_measured_whatever_is_known_of_the_rest(
    evaluator: Synthetic, ledger: Ledger
) -> None:
    runner, known, new = runner_of(evaluator, ledger), candidate(20, 9, 9), candidate(20, 8, 8)
    runner.judge(known, 0.0)
    measured = runner.measure([known, new], blocks=1)
    for one in measured:
        expected = [evaluator.score(one.candidate, question) for question in evaluator.blocks[0]]
        assert one.questions is not None
        assert one.questions.tolist() == expected
        assert one.seen == 256
        assert one.metric == pytest.approx(np.mean(expected))
    assert {task.shard.block for task in evaluator.tasks if task.candidate == new} == {0}


def test_workers_that_would_be_idle_begin_with_what_may_come_next(
    evaluator: Synthetic, ledger: Ledger
) -> None:
    first, *others = (candidate(k, k, k) for k in (31, 30, 29))
    pool = Shuffled(evaluator, 3, 1)
    runner = runner_of(evaluator, ledger, pool)
    runner.judge(first, 0.0, others)
    early = {task.candidate for task in evaluator.tasks} | {
        task.candidate for task in pool.running.values()
    }
    assert early & set(others)
    measured = runner.judge(others[1], 0.0)
    assert is_whole(evaluator, measured)
    assert not any(task.candidate == others[0] for queue in pool.queues for task in queue)
    assert ledger.evaluations == runner.computed - 3 == len(evaluator.tasks) - 3


def test_two_runners_on_one_pool_keep_their_results_apart(
    evaluator: Synthetic, ledger: Ledger
) -> None:
    """What one has abandoned may finish when the other waits."""
    ours, theirs = evaluator.blocks[:2], evaluator.blocks[2:]
    pool = Shuffled(evaluator, 3, 4)
    one, other = (
        Runner(part, SPACE, full_flops, blocks, evaluator, ledger)
        for part, blocks in ((pool, ours), (Part(pool, 2), theirs))
    )
    for keep in range(8, 20):
        asked = candidate(keep, 5, 5)
        one.judge(asked, 1.0)
        measured, before = other.measure([asked])[0], one.judge(candidate(keep, 4, 4), 0.0)
        for found, blocks in ((measured, theirs), (before, ours)):
            expected = [evaluator.score(found.candidate, q) for block in blocks for q in block]
            assert found.questions is not None
            assert found.questions.tolist() == expected
    assert ledger.evaluations + 3 == len(set(evaluator.tasks)) > one.computed + other.computed


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_search_finds_the_same_with_workers_that_finish_in_any_order(
    workers: int, evaluator: Synthetic, ledger: Ledger, tmp_path: Path
) -> None:
    expected = search(runner_of(evaluator, ledger))
    alone = len(evaluator.tasks)
    evaluator.tasks.clear()
    with Ledger.open(tmp_path / "other", evaluator.fingerprint()) as other:
        found = search(runner_of(evaluator, other, Shuffled(evaluator, workers, workers)))
    same = ("schedule", "metric", "kl", "unpruned_metric", "evaluations", "decoder_flops_naive")
    assert [found[name] for name in same] == [expected[name] for name in same]
    assert len(evaluator.tasks) >= alone  # what runs is not stopped


def test_an_interrupted_search_goes_on(evaluator: Synthetic, tmp_path: Path) -> None:
    path = tmp_path / "ledger"

    def interrupt(task: Task) -> None:
        if len(evaluator.tasks) in (5, 9, 30):
            raise KeyboardInterrupt

    expected = _search_on(tmp_path / "other", evaluator)
    total = len(evaluator.tasks)
    evaluator.tasks.clear()
    evaluator.heard = interrupt
    with Ledger.open(path, evaluator.fingerprint()) as ledger:
        runner = runner_of(evaluator, ledger)
        for lost in (1, 2):  # the same runner, and its ledger, are still of use
            with pytest.raises(KeyboardInterrupt):
                search(runner)
            assert runner.computed == len(evaluator.tasks) - lost
    with pytest.raises(KeyboardInterrupt):
        _search_on(path, evaluator)
    assert _search_on(path, evaluator) == expected
    assert len(evaluator.tasks) == total + 3


def _search_on(path: Path, evaluator: Synthetic) -> dict[str, Any]:
    with Ledger.open(path, evaluator.fingerprint()) as ledger:
        return search(runner_of(evaluator, ledger))


def test_counts_and_prices(evaluator: Synthetic, ledger: Ledger) -> None:
    runner, asked = runner_of(evaluator, ledger), [candidate(9, 9, 9), candidate(9, 9, 0)]
    runner.measure([*asked, asked[0]])
    runner.judge(asked[0], 1.0)
    blocks = [whole(i, block) for i, block in enumerate(evaluator.blocks)]
    everything = [full_flops(one, block) for one in asked for block in blocks]
    unpruned = [full_flops(SPACE.unpruned(), block) for block in blocks]
    assert runner.evaluations == 2
    assert runner.reused == 0
    assert runner.decoder_flops_naive == sum(everything) + sum(unpruned)
    assert runner.decoder_flops_spent == sum(everything) // 2 + sum(unpruned)
    again = runner_of(evaluator, ledger)
    again.measure(asked)
    assert again.computed == 0
    assert again.reused == runner.computed == len(evaluator.tasks)
    assert again.decoder_flops_spent == runner.decoder_flops_spent
    assert again.decoder_flops_naive == runner.decoder_flops_naive


def test_progress_says_how_far_it_is(evaluator: Synthetic, ledger: Ledger) -> None:
    said: list[Progress] = []
    runner = runner_of(evaluator, ledger, progress=said.append)
    runner.unpruned()
    assert [one.done for one in said] == [0, 256, 512, 600]
    assert said[0].eta_s is said[0].metric is None
    said.clear()
    measured = runner.judge(one := candidate(20, 20, 20), 0.0)
    assert all(step.candidate == one and step.total == 600 for step in said)
    assert [step.done for step in said] == sorted({step.done for step in said})
    assert said[-1].done == 600
    assert said[-1].eta_s == 0
    assert said[-1].metric == measured.metric
    middle = said[len(said) // 2]
    assert middle.eta_s is not None
    said.clear()
    runner.expected = 5
    runner.judge(candidate(20, 20, 19), 0.0)
    assert said[-1].eta_s is not None
    assert said[-1].eta_s > 0


def test_what_is_settled_is_said_before_work_and_not_without(
    evaluator: Synthetic, ledger: Ledger
) -> None:
    runner, one = runner_of(evaluator, ledger), candidate(20, 20, 20)
    runner.measure([one])
    runner.settle(one, 1)
    runner.settle(one, 2)
    runner.measure([one])
    assert not hasattr(evaluator, "settled")
    runner.measure([candidate(20, 20, 10)])
    assert evaluator.settled == (one, 2)


@pytest.mark.parametrize(
    "metric",
    [[np.nan], [1.5], [1.0, 1.0]],
    ids=["not a number", "better than the best", "of too many questions"],
)
def test_an_impossible_answer_is_not_kept(
    metric: Sequence[float], evaluator: Synthetic, ledger: Ledger
) -> None:
    class Broken(Synthetic):
        def evaluate(self, candidate: Candidate, shard: Shard) -> Outcome:
            return Outcome(np.array(metric), np.zeros(1), 1)

    with pytest.raises(ValueError, match="metric"):
        runner_of(Broken(blocks_of(1)), ledger).judge(candidate(1, 1, 1), 0.0)
    assert ledger.evaluations == 0
