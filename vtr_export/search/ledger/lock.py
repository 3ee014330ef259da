"""One search at a time writes a ledger; another one is told who does."""

import fcntl
import json
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vtr_export.errors import LedgerError


@dataclass(frozen=True)
class Lock:
    """The file beside a ledger whose lock says that its owner lives; gone with :meth:`release`.

    What a killed owner leaves behind holds nobody up. Where the file system has no such locks,
    SQLite's own remain.
    """

    file: Path
    descriptor: int

    @classmethod
    def take(cls, ledger: Path) -> "Lock":
        """Raises LedgerError when another search holds it, OSError when it cannot be made."""
        file = ledger.with_name(f"{ledger.name}-lock")
        while True:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if _hold(descriptor, ledger) and _is_at(descriptor, file):
                    _sign(descriptor)
                    return cls(file, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its owner removed it in between

    def release(self) -> None:
        """Another search may have it."""
        with suppress(OSError):
            self.file.unlink()
        os.close(self.descriptor)


def _hold(descriptor: int, ledger: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LedgerError(
            f"the ledger is being written by another search{_owner(descriptor)}",
            where=str(ledger),
            hint="wait for it, stop it, or use --ledger OTHER",
        ) from None
    except OSError:  # no locks here
        return True
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f": process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # not signed yet
        return ""
