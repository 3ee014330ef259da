"""Records of a ledger: named values in checksummed frames that are found again in any bytes.

A frame never needs more room than one page of the database has, so SQLite stores it in one piece,
and :func:`recover` reads it back from a file that SQLite itself can no longer open.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PAGE_BYTES = 4096
FRAME_BYTES = 3600  # a page, less its own bookkeeping and what the row has for people
_MARK = b"vtr\xff\x00rec"
_HEAD = struct.Struct("<8sQHHHH")  # mark, number, part, parts, bytes of the name, of the value
_CHECK_BYTES = 16


@dataclass(frozen=True)
class Record:
    """``value`` was the ``number``-th thing written; of those of one name the latest holds."""

    number: int
    name: str
    value: bytes

    def frames(self) -> list[bytes]:
        """In as many parts as it takes."""
        name = self.name.encode()
        room = FRAME_BYTES - _HEAD.size - len(name) - _CHECK_BYTES
        parts = [self.value[i : i + room] for i in range(0, len(self.value), room)] or [b""]
        return [_frame(self.number, i, len(parts), name, part) for i, part in enumerate(parts)]


def recover(pieces: Iterable[bytes]) -> list[Record]:
    """Every record that is whole somewhere in the bytes, the latest of each name, in order."""
    values: dict[tuple[int, str], dict[int, bytes]] = {}
    counts: dict[tuple[int, str], int] = {}
    for piece in pieces:
        for number, part, parts, name, value in _scan(piece):
            values.setdefault((number, name), {})[part] = value
            counts[number, name] = parts
    whole = sorted(key for key in values if len(values[key]) == counts[key])
    latest = {name: number for number, name in whole}
    return [
        Record(number, name, b"".join(values[number, name][i] for i in range(counts[number, name])))
        for number, name in whole
        if latest[name] == number
    ]


def is_frame(data: object) -> bool:
    """Whether these bytes are one frame and nothing else."""
    return isinstance(data, bytes) and data.startswith(_MARK) and _size(data, 0) == len(data)


def _frame(number: int, part: int, parts: int, name: bytes, value: bytes) -> bytes:
    body = _HEAD.pack(_MARK, number, part, parts, len(name), len(value)) + name + value
    return body + _check(body)


def _check(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECK_BYTES).digest()


def _size(data: bytes, at: int) -> int:
    """Bytes of the frame that starts there; 0 where it is cut or damaged."""
    if len(data) < at + _HEAD.size:
        return 0
    *_, name, value = _HEAD.unpack_from(data, at)
    end = at + _HEAD.size + name + value
    found = data[end : end + _CHECK_BYTES]
    return end + _CHECK_BYTES - at if found == _check(data[at:end]) else 0


def _scan(data: bytes) -> Iterator[tuple[int, int, int, str, bytes]]:
    at = data.find(_MARK)
    while at >= 0:
        if size := _size(data, at):
            _, number, part, parts, name_bytes, value_bytes = _HEAD.unpack_from(data, at)
            value_at = at + _HEAD.size + name_bytes
            name = data[at + _HEAD.size : value_at].decode()
            yield number, part, parts, name, data[value_at : value_at + value_bytes]
        at = data.find(_MARK, at + (size or 1))
