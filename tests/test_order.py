"""In which order questions are asked."""

import numpy as np

from vtr_export.search.evaluator import Unpruned
from vtr_export.search.order import SIZE, SIZES, Order

BLOCKS = [tuple(f"{block}.{row}" for row in range(200)) for block in range(2)]


def order() -> Order:
    """Margins fall with the row: the last row of each block is the hardest."""
    margins = np.linspace(200, 1, 200)
    return Order(BLOCKS, [Unpruned(np.ones(200), margins, 0) for _ in BLOCKS])


def test_the_hardest_of_every_block_come_first_and_everything_once() -> None:
    shards = order().shards({})
    assert [shard.block for shard in shards[:4]] == [0, 1, 0, 1]
    assert [len(shard) for shard in shards if shard.block == 0] == [*SIZES, SIZE, SIZE, 8]
    assert shards[0].rows == tuple(range(199, 199 - SIZES[0], -1))
    for block in (0, 1):
        rows = [row for shard in shards if shard.block == block for row in shard.rows]
        assert sorted(rows) == list(range(200))


def test_what_was_lost_comes_before_what_is_hard() -> None:
    learning = order()
    first = learning.shards({})[1]
    scores = np.ones(len(first))
    scores[[3, 5]] = 0
    learning.learn(first, scores)
    scores[3] = 1
    learning.learn(first, scores)
    lost = [first.rows[5], first.rows[3]]
    assert learning.lost == {200 + lost[0]: 2, 200 + lost[1]: 1}
    again = learning.shards(learning.lost)[1]
    assert again.block == 1
    assert list(again.rows[:3]) == [*lost, 199]


def test_a_shard_is_named_by_its_questions_and_their_order() -> None:
    shards = order().shards({})
    assert len({shard.sha256 for shard in shards}) == len(shards)
    assert [shard.sha256 for shard in shards] == [shard.sha256 for shard in order().shards({})]
