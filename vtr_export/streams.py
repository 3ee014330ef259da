"""Files read and written once, front to back, and hashed on the way by threads beside."""

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from vtr_export.errors import CheckpointError

CHUNK_BYTES = 8 << 20
MAX_WAITING = 3  # chunks a lane holds before the one who feeds it waits

Array: TypeAlias = npt.NDArray[Any]


class Lane:
    """One thread that does what it is given in the order given; errors surface at the feeder."""

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[Future[Any]] = deque()
        return self

    def put(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Queue ``work(*arguments)``; waits while too much is queued."""
        while len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work, *arguments))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._waiting:
                future.result()


class ShardReader:
    """Reads tensors of one file in ascending order, and every byte between for the hash."""

    def __init__(self, shard: Path, lane: Lane, advance: Callable[[int], None]) -> None:
        self.shard, self._lane, self._advance = shard, lane, advance
        self._hash = hashlib.sha256()
        self._hashed = 0

    def __enter__(self) -> Self:
        self._file = open_shard(self.shard)
        self._size_bytes = os.fstat(self._file.fileno()).st_size
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._skip_to(self._size_bytes)
            _forget(self._file)

    def fill(self, values: Array, offset: int) -> None:
        """Read ``values`` (contiguous) from ``offset``; the hash takes what it has not seen."""
        self._skip_to(offset)
        fill(self._file, values, offset, self.shard)
        fresh = raw_view(values)[max(0, self._hashed - offset) :]
        if len(fresh):
            self._take(fresh)

    def digest(self) -> str:
        """The sha256 of the whole file, once reader and lane are closed.

        CheckpointError when the file lies in a hub cache, which names files by their sha256, and
        is not what its name says.
        """
        digest = self._hash.hexdigest()
        blob = self.shard.resolve()
        named = blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name)
        if named and blob.name != digest:
            raise CheckpointError(
                f"corrupt: its sha256 is {digest}, not the one it was downloaded with",
                where=str(self.shard),
                hint=f"delete {blob} and download the model again",
            )
        return digest

    def _skip_to(self, offset: int) -> None:
        while self._hashed < offset:
            gap = np.empty(min(CHUNK_BYTES, offset - self._hashed), np.uint8)
            fill(self._file, gap, self._hashed, self.shard)
            self._take(raw_view(gap))

    def _take(self, fresh: memoryview) -> None:
        self._lane.put(self._hash.update, fresh)
        self._hashed += len(fresh)
        self._advance(len(fresh))


class Sink:
    """A file of known size, written front to back; full disks are found before the first byte."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.hash = hashlib.sha256()
        self._path, self._size_bytes, self._position = path, size_bytes, 0

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        try:
            _allocate(self._file.fileno(), self._size_bytes)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, values: Array, offset: int) -> None:
        """Append ``values``, after zeros up to ``offset`` when the file is not there yet."""
        for part in (bytes(max(0, offset - self._position)), raw_view(values)):
            self.hash.update(part)
            self._file.write(part)
            self._position += len(part)


def open_shard(shard: Path) -> FileIO:
    """``shard``, unbuffered; CheckpointError when it cannot be opened."""
    try:
        return shard.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(shard, str(error.strerror)) from error


def fill(file: FileIO, values: Array, offset: int, shard: Path) -> None:
    """Read the bytes of ``values`` (contiguous) from ``offset``; CheckpointError at the end."""
    view = raw_view(values)
    try:
        file.seek(offset)
        while len(view):
            count = file.readinto(view)
            if not count:
                raise _unreadable(shard, "it ends early")
            view = view[count:]
    except OSError as error:
        raise _unreadable(shard, str(error.strerror)) from error


def raw_view(values: Array) -> memoryview:
    """The bytes of a contiguous array, not copied."""
    return values.reshape(-1).view(np.uint8).data


def _unreadable(shard: Path, reason: str) -> CheckpointError:
    hint = "was it changed, or unplugged, meanwhile? copy or download it again"
    return CheckpointError(f"cannot be read: {reason}", where=str(shard), hint=hint)


def _allocate(descriptor: int, size_bytes: int) -> None:
    if size_bytes and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size_bytes)


def _forget(file: FileIO) -> None:
    """Let the page cache drop the file: it is not read again."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
