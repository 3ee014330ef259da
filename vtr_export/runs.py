"""Elements of a stored tensor, in its own order, from wherever they lie in the shard."""

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import as_strided

from vtr_export.checkpoint import TensorRef
from vtr_export.streams import Array

Fill: TypeAlias = Callable[[Array, int], None]  # an array, from an offset of the file
SHORT_BYTES = 512  # below it, one read of all that lies between costs less than a read a run


def elements(ref: TensorRef, fill: Fill) -> Fill:
    """What reads elements of ``ref`` into an array, from the given one on.

    Where runs are short, all that lies between its first and last byte is held meanwhile.
    """
    if ref.loops and _run_bytes(ref) < SHORT_BYTES:
        return _Gathered(ref, fill)

    def read(values: Array, start: int) -> None:
        for part, offset in _runs(ref, values, start):
            fill(part, offset)

    return read


class _Gathered:
    """Reads once, when it is first asked."""

    def __init__(self, ref: TensorRef, fill: Fill) -> None:
        self._ref, self._fill = ref, fill
        self._whole: Array | None = None

    def __call__(self, values: Array, start: int) -> None:
        if self._whole is None:
            self._whole = self._gather(values.dtype)
        values.reshape(-1)[:] = self._whole[start : start + values.size]

    def _gather(self, dtype: np.dtype[Any]) -> Array:
        ref, item = self._ref, dtype.itemsize
        run = _run_bytes(ref)
        between = np.empty((sum((n - 1) * step for n, step in ref.loops) + run) // item, dtype)
        self._fill(between, ref.offset)
        counts, steps = zip(*ref.loops, strict=True)
        found = as_strided(between, (*counts, run // item), (*steps, item), writeable=False)
        return np.ascontiguousarray(found).reshape(-1)


def _run_bytes(ref: TensorRef) -> int:
    return ref.size_bytes // math.prod(count for count, _ in ref.loops)


def _runs(ref: TensorRef, values: Array, start: int) -> Iterator[tuple[Array, int]]:
    """Parts of ``values`` (contiguous; ``start`` elements into the tensor), and where each lies."""
    flat, done, run = values.reshape(-1), 0, max(1, _run_bytes(ref))
    while done < flat.size:
        number, inside = divmod((start + done) * flat.itemsize, run)
        part = flat[done : done + (run - inside) // flat.itemsize]
        yield part, ref.offset + _offset(ref, number) + inside
        done += part.size


def _offset(ref: TensorRef, number: int) -> int:
    """Of a run, from the first on."""
    found = 0
    for count, step in reversed(ref.loops):
        number, index = divmod(number, count)
        found += index * step
    return found
