"""Device memory that is used again: a step of a long answer allocates only what has grown."""

import weakref
from collections.abc import Callable
from typing import Final

ALIGNMENT: Final = 256  # TensorRT asks for it
HEADROOM: Final = 4  # a quarter more than asked for, so that a cache grows into what it has


class Block:
    """A piece of a pool. It goes back when nothing refers to it any more."""

    def __init__(self, pool: "Pool", address: int, size_bytes: int) -> None:
        self.address, self.size_bytes, self._pool = address, size_bytes, pool

    def __del__(self) -> None:
        self._pool.put(self.address, self.size_bytes)


class Pool:
    """Hands out device memory and keeps what comes back.

    Its users enqueue on one stream, so what is handed out again is written after its last reader.
    """

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], None]) -> None:
        """``allocate`` takes bytes and gives an address; ``free`` takes the address."""
        self._allocate, self._free = allocate, free
        self._idle: list[tuple[int, int]] = []  # bytes, address; ascending
        self._scratch = (0, 0)
        weakref.finalize(self, _free_all, self._idle, free)

    def take(self, size_bytes: int) -> Block:
        """At least ``size_bytes``, and never an address of nothing: the smallest that is idle.

        Where none is large enough, the largest idle one makes room for its successor.
        """
        for number, (size, address) in enumerate(self._idle):
            if size_bytes <= size <= 2 * _rounded(size_bytes):
                del self._idle[number]
                return Block(self, address, size)
        smaller = [entry for entry in self._idle if entry[0] < size_bytes]
        if smaller:
            self._idle.remove(smaller[-1])
            self._free(smaller[-1][1])
        size = _rounded(size_bytes)
        return Block(self, self._allocate(size), size)

    def put(self, address: int, size_bytes: int) -> None:
        """Back into the pool; a block does it by itself."""
        self._idle.append((size_bytes, address))
        self._idle.sort()

    def scratch(self, size_bytes: int) -> int:
        """The address of memory that all share, because they never run at the same time."""
        size, address = self._scratch
        if size < size_bytes:
            if size:
                self.put(address, size)
            size = _rounded(size_bytes)
            self._scratch = size, self._allocate(size)
        return self._scratch[1]


def _rounded(size_bytes: int) -> int:
    wanted = size_bytes + size_bytes // HEADROOM
    return max(1, -(-wanted // ALIGNMENT)) * ALIGNMENT


def _free_all(idle: list[tuple[int, int]], free: Callable[[int], None]) -> None:
    for _, address in idle:
        free(address)
    idle.clear()
