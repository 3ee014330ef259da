"""What a search has learned, kept: each result is on the disk before the next one is asked for.

An SQLite database of one table, a frame (:mod:`vtr_export.search.ledger.records`) a row, written
once and never changed. Its rollback journal is emptied by every commit: at rest, also after a kill,
a ledger is one whole file that can be copied, which it is not with a write-ahead log, and a network
folder will do. ``synchronous=FULL``: what :meth:`Ledger.put` returned from survives a power cut.
"""

import hashlib
import json
import sqlite3
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from vtr_export.errors import LedgerError
from vtr_export.search.candidate import Candidate
from vtr_export.search.evaluator import Floats, Outcome, Shard, Unpruned
from vtr_export.search.ledger.file import (
    INSERT,
    NAME,
    OTHER,
    OUTCOME,
    check_place,
    explained,
    open_file,
    rows_of,
)
from vtr_export.search.ledger.lock import Lock
from vtr_export.search.ledger.records import Record

Fingerprint = Mapping[str, str]
_FINGERPRINT: Final = "fingerprint"
_UNPRUNED: Final = "unpruned:"
_FLOPS: Final = struct.Struct("<Q")


def key_of(fingerprint: Fingerprint, candidate: Candidate | None, shard: Shard) -> str:
    """What names a result: all that it depends on, hashed; no candidate is the unpruned pass."""
    asked = [dict(fingerprint), candidate and candidate.key(), shard.sha256]
    return _sha256(asked)


class Ledger:
    """Results by their key, and notes by name, for one fingerprint; all of them are in memory.

    ``warnings`` says what was wrong with the file. One process writes at a time. Every method that
    writes raises LedgerError when the disk is full or the file went away; what was stored stays.
    """

    def __init__(self, path: Path, fingerprint: Fingerprint, lock: Lock) -> None:
        self.path, self.fingerprint = path, dict(fingerprint)
        first = Record(0, _FINGERPRINT, _json(self.fingerprint))
        opened = open_file(path, first, self._check)
        self.warnings = (opened.warning,) if opened.warning else ()
        self._lock, self._connection = lock, opened.connection
        self._values = {record.name: record.value for record in opened.records}
        self._next = 1 + max(record.number for record in opened.records)

    @classmethod
    def open(cls, path: str | Path, fingerprint: Fingerprint) -> Self:
        """Open the ledger at ``path``, or make it; a damaged one keeps what is whole.

        Raises LedgerError for what is not a ledger, is of another fingerprint or a newer version,
        is being written by another search, or cannot be written.
        """
        path = Path(path).expanduser().resolve()
        with explained(path):
            check_place(path)
            lock = Lock.take(path)
            try:
                return cls(path, fingerprint, lock)
            except BaseException:
                lock.release()
                raise

    @property
    def evaluations(self) -> int:
        """Shards of candidates that are stored."""
        return sum(name.startswith(OUTCOME) for name in self._values)

    def get(self, key: str) -> Outcome | None:
        """A stored evaluation."""
        if (value := self._values.get(OUTCOME + key)) is None:
            return None
        metric, kl, flops = _unpack(value)
        return Outcome(metric, kl, flops)

    def get_unpruned(self, key: str) -> Unpruned | None:
        """A stored unpruned pass over a block."""
        if (value := self._values.get(_UNPRUNED + key)) is None:
            return None
        metric, margin, flops = _unpack(value)
        return Unpruned(metric, margin, flops)

    def put(self, key: str, result: Outcome | Unpruned) -> None:
        """Store a result, to the disk; a key that is known keeps its first one."""
        if isinstance(result, Outcome):
            name, second = OUTCOME + key, result.kl
        else:
            name, second = _UNPRUNED + key, result.margin
        if name not in self._values:
            self._write(name, _pack(result.metric, second, result.decoder_flops))

    def note(self, name: str, value: Any) -> None:
        """Remember a JSON value by a name; the latest holds."""
        note, text = self._note(name), _json(value)
        if self._values.get(note) != text:
            self._write(note, text)

    def noted(self, name: str) -> Any:
        """What was noted under that name; None where nothing was."""
        value = self._values.get(self._note(name))
        return None if value is None else json.loads(value)

    def close(self) -> None:
        """Another search may open it."""
        with suppress(sqlite3.Error):  # the journal's empty file goes; all else is on the disk
            for setting in ("locking_mode=NORMAL", "journal_mode=DELETE"):
                self._connection.execute(f"PRAGMA {setting}").fetchall()
        self._connection.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _note(self, name: str) -> str:
        """Bound to the fingerprint, for it may be the record that a damaged ledger lost."""
        short = name if len(name) <= NAME else _sha256(name)
        return f"note:{_sha256(self.fingerprint)[:16]}:{short}"

    def _write(self, name: str, value: bytes) -> None:
        record, self._next = Record(self._next, name, value), self._next + 1
        with explained(self.path), self._connection as connection:  # commits, or rolls back
            connection.execute("BEGIN")
            connection.executemany(INSERT, rows_of(record))
        self._values[name] = value

    def _check(self, records: Sequence[Record]) -> None:
        """LedgerError, with what differs, when they are another fingerprint's."""
        stored = next((r.value for r in records if r.name == _FINGERPRINT), None)
        if stored is None or (was := json.loads(stored)) == self.fingerprint:
            return
        now = self.fingerprint
        changes = [
            f"{name} was {was.get(name, 'not there')}, is {now.get(name, 'not there')}"
            for name in was | now
            if was.get(name) != now.get(name)
        ]
        raise LedgerError(
            f"the ledger is of another search: {'; '.join(changes)}",
            where=str(self.path),
            hint=f"{OTHER}; this one is left as it is",
        )


def _pack(metric: Floats, second: Floats, flops: int) -> bytes:
    both = np.stack([metric, second]).astype("<f8")
    return _FLOPS.pack(flops) + both.tobytes()


def _unpack(value: bytes) -> tuple[Floats, Floats, int]:
    metric, second = np.frombuffer(value, "<f8", offset=_FLOPS.size).reshape(2, -1).astype(float)
    return metric, second, _FLOPS.unpack_from(value)[0]


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _sha256(value: Any) -> str:
    return hashlib.sha256(_json(value)).hexdigest()
