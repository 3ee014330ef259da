"""The file of a ledger: made in one step, checked when it is opened, read back when damaged."""

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from glob import escape
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import Final, NoReturn

from vtr_export.errors import LedgerError
from vtr_export.search.ledger.records import PAGE_BYTES, Record, is_frame, recover

APPLICATION: Final = int.from_bytes(b"vtrS")
SCHEMA: Final = 1
OUTCOME: Final = "outcome:"  # how names of evaluations begin
INSERT: Final = "INSERT INTO record (name, body) VALUES (?, ?)"
_ROW: Final = "(id INTEGER PRIMARY KEY, name TEXT NOT NULL, body BLOB NOT NULL)"
_TABLES: Final = (
    f"CREATE TABLE head {_ROW}",  # the first record: on a page before all others
    f"CREATE TABLE record {_ROW}",
)
_SELECTS: Final = tuple(
    f"SELECT CAST(body AS BLOB) FROM {table} ORDER BY id" for table in ("head", "record")
)
NAME: Final = 100  # characters; with a frame they must fit on a page
_SQLITE: Final = b"SQLite format 3\0"
_SIDECARS: Final = ("-journal", "-wal", "-shm")
_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DAMAGED: Final = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,  # our table is not there
    sqlite3.SQLITE_TOOBIG,  # a length that cannot be
}
OTHER: Final = "use --ledger OTHER"


class _DamageError(Exception):
    """SQLite cannot read it, or a checksum does not hold."""


@dataclass(frozen=True)
class Opened:
    """A connection that alone may write, and what is stored; ``warning`` where it was damaged."""

    connection: sqlite3.Connection
    records: list[Record]
    warning: str = ""


def open_file(path: Path, first: Record, check: Callable[[Sequence[Record]], None]) -> Opened:
    """Open the ledger at ``path``, or make it; ``first`` is the first record of a new one.

    ``check`` may refuse what is stored, and nothing is changed then. A damaged ledger is replaced
    by one of the records that are still whole, and kept beside it as ``….damaged-N``. Raises
    LedgerError when it is something else, and OSError and sqlite3.Error as they come.
    """
    for debris in path.parent.glob(f"{escape(path.name)}.tmp-*"):
        debris.unlink()
    if _is_new(path):
        if _sidecars(path):
            _set_aside(path)
        _put(_stage(path, [first]), path)
    _refuse_foreign(path)
    before = _all_bytes(path) if _sidecars(path) else []  # SQLite is about to undo a transaction
    try:
        opened = _read(path)
    except _DamageError:
        return _salvage(path, before, first, check)
    try:
        check(opened.records)
    except BaseException:
        opened.connection.close()
        raise
    return opened


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what a file system or SQLite refuses into a LedgerError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            _fail_full(path)
        _fail(f"the ledger cannot be written: {error.strerror}", path)
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code is None:
            raise  # not SQLite's word: our bug
        if code & 0xFF == sqlite3.SQLITE_FULL:
            _fail_full(path)
        if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            hint = f"close what has it open, or {OTHER}"
            _fail("the ledger is in use by another program", path, hint)
        if code & 0xFF in _DAMAGED:
            hint = "search again: what is whole is read back"
            _fail(f"the ledger was damaged while it was open: {error}", path, hint)
        _fail(f"the ledger cannot be written: {error}", path)


def check_place(path: Path) -> None:
    """LedgerError when ``path`` cannot be a ledger that is written."""
    if path.is_dir():
        _fail("the ledger is a folder", path, "give a file, which need not exist yet")
    if path.exists() and not path.is_file():
        _fail("the ledger is not a file", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        _fail(f"the ledger cannot be written: no permission to write in {path.parent}", path)
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        _fail("the ledger cannot be written: no permission", path)


def _fail(message: str, path: Path, hint: str = OTHER) -> NoReturn:
    raise LedgerError(message, where=str(path), hint=hint) from None


def _fail_full(path: Path) -> NoReturn:
    hint = "free some space and search again: what is stored is used"
    _fail("the disk is full", path, hint)


def _is_new(path: Path) -> bool:
    """Nothing is there; an empty file with a journal lost what was in it."""
    return not path.exists() or (path.stat().st_size == 0 and not _sidecars(path))


def _refuse_foreign(path: Path) -> None:
    """LedgerError unless the head says that it is a ledger, or too little of it is left to say."""
    with path.open("rb") as file:
        head = file.read(100)
    if not head.startswith(_SQLITE[: len(head)]):
        if not recover(_all_bytes(path)):  # else a ledger whose head was overwritten
            _fail("this is not a ledger, and it is left as it is", path)
    elif len(head) >= 72:
        application, version = int.from_bytes(head[68:72]), int.from_bytes(head[60:64])
        if application != APPLICATION:
            _fail("this is another application's database, and it is left as it is", path)
        if version > SCHEMA:
            hint = f"update vtr-export, or {OTHER}"
            _fail(f"the ledger is of version {version}, newer than {SCHEMA}", path, hint)


def _read(path: Path) -> Opened:
    """A transaction that was cut short is undone, every page and checksum looked at."""
    if path.stat().st_size < PAGE_BYTES:
        raise _DamageError  # SQLite would begin a new database over it
    connection = sqlite3.connect(path, timeout=1, isolation_level=None)
    try:
        for setting in ("locking_mode=EXCLUSIVE", "journal_mode=TRUNCATE", "synchronous=FULL"):
            connection.execute(f"PRAGMA {setting}").fetchall()
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("COMMIT")  # the lock stays
        health = connection.execute("PRAGMA integrity_check(1)").fetchone()
        bodies = [body for select in _SELECTS for (body,) in connection.execute(select)]
        if health != ("ok",) or not all(map(is_frame, bodies)):
            raise _DamageError
    except sqlite3.Error as error:
        connection.close()
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            raise _DamageError from error
        raise
    except BaseException:
        connection.close()
        raise
    return Opened(connection, recover(bodies))


def _salvage(
    path: Path, before: list[bytes], first: Record, check: Callable[[Sequence[Record]], None]
) -> Opened:
    """Records of the damaged file, in one that is whole; killed anywhere, it starts again."""
    records = recover([*before, *_all_bytes(path)])
    check(records)
    stored = next((record for record in records if record.name == first.name), first)
    staging = _stage(path, [stored, *(record for record in records if record != stored)])
    kept = _set_aside(path)
    _put(staging, path)
    opened = _read(path)
    survived = sum(record.name.startswith(OUTCOME) for record in records)
    warning = f"the ledger was damaged: {survived} evaluations were read back, the rest is redone"
    return Opened(opened.connection, opened.records, f"{warning}; the damaged one is {kept}")


def _stage(path: Path, records: Sequence[Record]) -> Path:
    """A whole ledger beside ``path``, on the disk."""
    staging = path.with_name(f"{path.name}.tmp-{os.getpid()}-{token_hex(4)}")
    try:
        with closing(sqlite3.connect(staging, isolation_level=None)) as connection:
            settings = (f"page_size={PAGE_BYTES}", "journal_mode=OFF", "synchronous=OFF")
            marks = (f"application_id={APPLICATION}", f"user_version={SCHEMA}")
            for setting in (*settings, *marks):
                connection.execute(f"PRAGMA {setting}").fetchall()
            connection.execute("BEGIN")
            for table in _TABLES:
                connection.execute(table)
            connection.executemany(INSERT.replace("record", "head"), rows_of(records[0]))
            for record in records[1:]:
                connection.executemany(INSERT, rows_of(record))
            connection.execute("COMMIT")
        _sync(staging)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    return staging


def rows_of(record: Record) -> list[tuple[str, bytes]]:
    """As the table takes them; what is left of the name is for people."""
    return [(record.name[:NAME], frame) for frame in record.frames()]


def _put(staging: Path, path: Path) -> None:
    staging.replace(path)
    _sync(path.parent)


def _set_aside(path: Path) -> Path:
    """Another name for the file, and for the journal that belongs to it and to no other."""
    kept = next(
        kept
        for number in count(1)
        if not (kept := path.with_name(f"{path.name}.damaged-{number}")).exists()
    )
    if path.exists():
        try:
            kept.hardlink_to(path)
        except OSError:  # no hard links here
            shutil.copy2(path, kept)
    for sidecar in _sidecars(path):
        sidecar.replace(kept.with_name(kept.name + sidecar.name.removeprefix(path.name)))
    return kept


def _sidecars(path: Path) -> list[Path]:
    """Files that SQLite would apply to this one."""
    files = [path.with_name(path.name + suffix) for suffix in _SIDECARS]
    return [file for file in files if file.is_file() and file.stat().st_size]


def _all_bytes(path: Path) -> list[bytes]:
    return [file.read_bytes() for file in (path, *_sidecars(path)) if file.exists()]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
