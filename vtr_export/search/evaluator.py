"""What a search asks of a model: answers to calibration questions under a candidate."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vtr_export.search.candidate import Candidate, Space

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shard:
    """Some questions of one block: ``rows`` are their places in it, hardest first."""

    block: int
    rows: tuple[int, ...]
    sha256: str  # of the questions, in this order

    @classmethod
    def of(cls, block: int, rows: tuple[int, ...], questions: tuple[str, ...]) -> "Shard":
        """``questions`` are the hashes of ``rows``."""
        return cls(block, rows, hashlib.sha256("\n".join(questions).encode()).hexdigest())

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Unpruned:
    """How a block is answered when nothing is dropped; entries as the block's questions."""

    metric: Floats
    margin: Floats  # least gap between the two best logits over the answer: small is hard
    decoder_flops: int


@dataclass(frozen=True)
class Outcome:
    """How a shard is answered under a candidate; entries as the shard's rows.

    ``kl`` is in nats: KL(unpruned ‖ pruned) of the next token, mean over the unpruned answer.
    """

    metric: Floats
    kl: Floats
    decoder_flops: int  # spent, padding included; layers that candidates share count once


class Evaluator(Protocol):
    """A model with its calibration questions in blocks.

    The same candidate and shard give the same metric in every process. Blocks are prepared when
    they are first needed (images encoded, unpruned answers found) and held.
    """

    @property
    def space(self) -> Space:
        """What can be searched."""
        ...

    def fingerprint(self) -> Mapping[str, str]:
        """What results depend on beside candidate and questions: model hash, dtype, metric, …."""
        ...

    def unpruned(self, block: int) -> Unpruned:
        """Answer a whole block, unpruned."""
        ...

    def settle(self, candidate: Candidate, layer: int) -> None:
        """Later candidates agree with this one before ``layer`` and in their score.

        A hint: what enters ``layer`` may be held, so that they cost only the layers that remain.
        Others stay right.
        """
        ...

    def evaluate(self, candidate: Candidate, shard: Shard) -> Outcome:
        """Answer a shard under ``candidate``."""
        ...
