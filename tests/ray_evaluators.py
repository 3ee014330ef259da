"""An evaluator for tests of the Ray pool; workers import it."""

import ctypes
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vtr_export.errors import InputError
from vtr_export.search.candidate import Candidate, Space
from vtr_export.search.evaluator import Outcome, Shard, Unpruned


class Rigged:
    """Numbers that follow from the question; mishaps where a file in ``folder`` asks for them.

    ``decoder_flops`` tells what only a worker knows: of ``unpruned`` its process, of an outcome
    how many settlements it heard of.
    """

    def __init__(self, folder: Path, space: Space | None = None) -> None:
        self.folder, self.heard = folder, 0
        self._space = space

    @property
    def space(self) -> Space:
        assert self._space is not None
        return self._space

    def fingerprint(self) -> Mapping[str, str]:
        return {"model": "rigged", "questions": str(self.folder)}

    def unpruned(self, block: int) -> Unpruned:
        values = np.arange(4.0) + block
        return Unpruned(values, -values, os.getpid())

    def settle(self, candidate: Candidate, layer: int) -> None:
        self.heard += 1

    def evaluate(self, candidate: Candidate, shard: Shard) -> Outcome:
        self.mishap()
        rows = np.array(shard.rows) * 10.0 + shard.block
        return Outcome(rows * candidate.keeps[-1], rows, self.heard)

    def full_flops(self, candidate: Candidate, shard: Shard) -> int:
        return len(shard)

    def mishap(self) -> None:
        if (self.folder / "slow").exists():
            time.sleep(0.2)
        if (self.folder / "crash").exists():
            print("the last words", file=sys.stderr, flush=True)
            ctypes.string_at(0)
        if (self.folder / "mistake").exists():
            raise InputError("no such image", where="a.jsonl:3", hint="take another")
        if (self.folder / "bug").exists():
            raise ZeroDivisionError("one by none")
