"""In which order a candidate is asked: first what earlier candidates got wrong."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Final

import numpy as np

from vtr_export.search.evaluator import Floats, Shard, Unpruned

SIZES: Final = (16, 48)  # questions of a block's first shards; a verdict may need no more
SIZE: Final = 64  # of those that follow
_MARGIN_DECIMALS: Final = 2  # what the noise of another machine leaves alone


class Order:
    """Cuts blocks into shards, the questions most often lost first, then those of least margin.

    ``lost`` counts, by a question's place in the set, the candidates that scored it below the
    unpruned model. It is noted with a candidate, so that a resumed search cuts the same shards.
    """

    def __init__(self, blocks: Sequence[Sequence[str]], unpruned: Sequence[Unpruned]) -> None:
        self._blocks = blocks
        self._margins = [np.round(each.margin, _MARGIN_DECIMALS) for each in unpruned]
        self._metric: Floats = np.concatenate([each.metric for each in unpruned])
        self._starts = np.cumsum([0, *map(len, blocks)])
        self.lost: dict[int, int] = {}

    def places(self, shard: Shard) -> list[int]:
        """Of its questions in the set."""
        start = int(self._starts[shard.block])
        return [start + row for row in shard.rows]

    def learn(self, shard: Shard, metric: Floats) -> None:
        """Count what a candidate lost."""
        for place, score in zip(self.places(shard), metric.tolist(), strict=True):
            if score < self._metric[place]:
                self.lost[place] = self.lost.get(place, 0) + 1

    def shards(self, lost: Mapping[int, int]) -> list[Shard]:
        """Wave by wave: the first shard of every block, then every second one."""
        cut = [self._cut(block, lost) for block in range(len(self._blocks))]
        return [shard for wave in zip_longest(*cut) for shard in wave if shard is not None]

    def _cut(self, block: int, lost: Mapping[int, int]) -> list[Shard]:
        hashes, start = self._blocks[block], int(self._starts[block])
        losses = np.array([-lost.get(start + row, 0) for row in range(len(hashes))])
        order = np.lexsort((self._margins[block], losses)).tolist()
        shards = list[Shard]()
        while order:
            size = SIZES[len(shards)] if len(shards) < len(SIZES) else SIZE
            rows, order = tuple(order[:size]), order[size:]
            shards.append(Shard.of(block, rows, tuple(hashes[row] for row in rows)))
        return shards
