"""A ledger gives back what was put, refuses what is not its own, and loses nothing that is whole."""

import fcntl
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_search import SCORE, SPACE, blocks_of, quick_folder, whole

from vtr_export.errors import LedgerError
from vtr_export.search.candidate import Candidate
from vtr_export.search.evaluator import Outcome, Unpruned
from vtr_export.search.ledger.ledger import Ledger, key_of
from vtr_export.search.ledger.records import FRAME_BYTES, Record, recover

FINGERPRINT = {"model": "sha256:12", "dtype": "fp32", "metric": "exact/1"}
QUESTIONS = 16


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


def outcome(number: int) -> Outcome:
    random = np.random.default_rng(number)
    return Outcome(random.random(QUESTIONS), random.random(QUESTIONS), 10**14 + number)


def key(number: int) -> str:
    return key_of(FINGERPRINT, SPACE.step(1, number, SCORE), whole(0, blocks_of(QUESTIONS)[0]))


def same(one: Outcome | None, other: Outcome) -> bool:
    return (
        one is not None
        and np.array_equal(one.metric, other.metric)
        and np.array_equal(one.kl, other.kl)
        and one.decoder_flops == other.decoder_flops
    )


def fill(path: Path, count: int) -> None:
    with Ledger.open(path, FINGERPRINT) as ledger:
        for number in range(count):
            ledger.put(key(number), outcome(number))


def numbers(path: Path, count: int) -> set[int]:
    """Which of the evaluations a ledger has; one that is there but different fails."""
    with Ledger.open(path, FINGERPRINT) as ledger:
        found = {n for n in range(count) if ledger.get(key(n)) is not None}
        assert all(same(ledger.get(key(n)), outcome(n)) for n in found)
        assert ledger.evaluations == len(found)
        return found


def refused(path: Path, *words: str, fingerprint: dict[str, str] = FINGERPRINT) -> None:
    with pytest.raises(LedgerError) as caught:
        Ledger.open(path, fingerprint)
    text = str(caught.value)
    assert all(word in text for word in ("VTR501", "help:", str(path), *words)), text


def test_what_was_put_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "ledger"
    unpruned = Unpruned(np.arange(900) / 7, -np.arange(900) / 3, 2**63)  # larger than a page
    state = {"keeps": [144, 0], "text": "ü" * 9000}
    with Ledger.open(path, FINGERPRINT) as ledger:
        assert ledger.get(key(0)) is None
        assert ledger.get_unpruned(key(0)) is None
        assert ledger.noted("state") is None
        ledger.put(key(0), outcome(0))
        ledger.put(key(0), unpruned)  # another kind of result
        ledger.put(key(0), outcome(1))  # the first stays
        for value in (1, None, state):
            ledger.note("state", value)
            assert ledger.noted("state") == value
        ledger.note(name := "ü" * 5000, "long")
        ledger.note(f"{name}.", "longer")
    with Ledger.open(path, FINGERPRINT) as ledger:
        assert same(ledger.get(key(0)), outcome(0))
        assert ledger.noted("state") == state
        assert (ledger.noted(name), ledger.noted(f"{name}.")) == ("long", "longer")
        again = ledger.get_unpruned(key(0))
        assert again is not None
        assert np.array_equal(again.metric, unpruned.metric)
        assert np.array_equal(again.margin, unpruned.margin)
        assert again.decoder_flops == unpruned.decoder_flops
        assert ledger.evaluations == 1
        assert not ledger.warnings
    assert [file.name for file in path.parent.iterdir()] == ["ledger"]
    data, bodies = path.read_bytes(), sqlite3.connect(path).execute("SELECT body FROM record")
    assert all(body in data for (body,) in bodies)  # in one piece, or it could not be read back


def test_a_key_names_all_that_a_result_depends_on() -> None:
    shards = [whole(0, block) for block in blocks_of(20, 10)]
    step = SPACE.step(1, 8, SCORE)
    other = Candidate(step.keeps, SPACE.scores[-1], step.parts)
    fingerprints = [FINGERPRINT, FINGERPRINT | {"dtype": "fp16"}]
    asked = [(f, c, s) for f in fingerprints for c in (None, step, other) for s in shards]
    assert len({key_of(*one) for one in asked}) == len(asked)
    backwards = dict(reversed(FINGERPRINT.items()))
    assert key_of(backwards, step, shards[0]) == key_of(FINGERPRINT, step, shards[0])


@given(
    st.dictionaries(st.text(max_size=40), st.binary(max_size=3 * FRAME_BYTES), max_size=5),
    st.binary(max_size=50),
    st.randoms(),
)
def test_records_are_found_in_any_bytes(
    values: dict[str, bytes], between: bytes, order: random.Random
) -> None:
    records = [Record(i, name, value) for i, (name, value) in enumerate(values.items())]
    old = [Record(0, record.name, b"old") for record in records[1:]]
    frames = [frame for record in [*old, *records] for frame in record.frames()]
    order.shuffle(frames)
    assert all(len(frame) <= FRAME_BYTES for frame in frames)
    assert recover([between.join([b"", *frames, b""])]) == records


def test_a_changed_fingerprint_is_refused_with_what_changed(tmp_path: Path) -> None:
    fill(path := tmp_path / "ledger", 3)
    before = path.read_bytes()
    changed = {"model": "sha256:34", "dtype": "fp32", "device": "cuda"}
    refused(
        path,
        "model was sha256:12, is sha256:34",
        "metric was exact/1, is not there",
        "device was not there, is cuda",
        "--ledger",
        fingerprint=changed,
    )
    with pytest.raises(LedgerError) as caught:
        Ledger.open(path, changed)
    assert "fp32" not in caught.value.message
    path.write_bytes(before[:-1])  # damaged, and of another search: left as it is
    refused(path, "model was", fingerprint=changed)
    assert path.read_bytes() == before[:-1]
    path.write_bytes(before)
    assert numbers(path, 3) == {0, 1, 2}


def text_file(path: Path) -> None:
    path.write_text("my thesis " * 1000)


def short_file(path: Path) -> None:
    path.write_text("SQL")


def foreign_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA application_id=7")
    connection.execute("CREATE TABLE record (id INTEGER PRIMARY KEY, name TEXT, body BLOB)")
    connection.close()


def plain_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE photos (name TEXT)")
    connection.close()


def newer(path: Path) -> None:
    fill(path, 1)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=2")
    connection.close()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (text_file, "not a ledger"),
        (foreign_database, "another application's"),
        (plain_database, "another application's"),
        (newer, "newer"),
        (Path.mkdir, "folder"),
        (os.mkfifo, "not a file"),
    ],
)
def test_what_is_not_a_ledger_is_left_alone(
    make: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    make(path := tmp_path / "ledger")
    before = path.read_bytes() if path.is_file() else None
    refused(path, words)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert [file.name for file in tmp_path.iterdir()] == ["ledger"]


def test_the_folder_of_a_ledger_cannot_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "ledger")


def test_a_read_only_place_is_refused_and_left_alone(small_disk: Path) -> None:
    fill(path := small_disk / "ledger", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused(path, "written")
    refused(small_disk / "new", "written")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert numbers(path, 1) == {0}


def test_a_full_disk_is_named_and_nothing_stored_is_lost(small_disk: Path) -> None:
    fill(path := small_disk / "ledger", 2)
    ballast = small_disk / "ballast"
    ledger = Ledger.open(path, FINGERPRINT)
    ballast.write_bytes(b"0" * (shutil.disk_usage(small_disk).free - 20000))
    stored = 2
    with pytest.raises(LedgerError, match="disk is full"):  # noqa: PT012 the first that fails
        while stored < 100:
            ledger.put(key(stored), outcome(stored))
            stored += 1
    assert ledger.get(key(stored)) is None
    ledger.close()
    with ballast.open("ab") as file:
        file.write(b"0" * (shutil.disk_usage(small_disk).free - 4096))
    refused(small_disk / "new", "disk is full")
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "disk is full")  # there is no room to read it back
    ballast.unlink()
    assert len(numbers(path, stored)) >= stored - 1


HOLD = """
import sys
from vtr_export.search.ledger.ledger import Ledger
with Ledger.open(sys.argv[1], {}) as ledger:
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has ``tmp_path / "ledger"`` open."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "ledger")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_search_is_told_who_writes_the_ledger(
    holder: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "ledger"
    refused(path, f"process {holder.pid}", "--ledger", fingerprint={})
    refused(path, f"process {holder.pid}", fingerprint={})  # the first refusal freed nothing
    holder.kill()
    holder.wait()
    with Ledger.open(path, {}) as ledger:  # what it left behind holds nobody up
        refused(path, f"process {os.getpid()}", fingerprint={})
        ledger.note("still", "ours")


def test_another_program_that_writes_is_waited_for_and_named(tmp_path: Path) -> None:
    fill(path := tmp_path / "ledger", 1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    refused(path, "another program")
    other.execute("ROLLBACK")
    other.execute("PRAGMA busy_timeout=0")
    with (
        Ledger.open(path, FINGERPRINT) as ledger,
        pytest.raises(sqlite3.OperationalError, match="locked"),
    ):
        other.execute("BEGIN IMMEDIATE")
    assert ledger.evaluations == 1
    other.close()


def test_a_lock_that_its_owner_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock, gone = tmp_path / "ledger", fcntl.flock, list[Path]()

    def late(descriptor: int, how: int) -> None:
        if not gone:
            gone.append(tmp_path / "ledger-lock")
            gone[0].unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with Ledger.open(path, FINGERPRINT):
        refused(path, f"process {os.getpid()}")


def test_a_ledger_that_another_program_gave_a_log_is_read_with_it(tmp_path: Path) -> None:
    fill(path := tmp_path / "ledger", 4)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA journal_mode=WAL")
    other.execute("INSERT INTO record (name, body) SELECT name, body FROM record LIMIT 1")
    for name in ("ledger", "ledger-wal"):
        shutil.copy(tmp_path / name, tmp_path / f"copy{name.removeprefix('ledger')}")
    other.close()
    assert numbers(tmp_path / "copy", 4) == {0, 1, 2, 3}
    assert numbers(path, 4) == {0, 1, 2, 3}
    assert path.read_bytes()[18:20] == b"\1\1"  # a rollback journal again


def test_people_can_ask_what_is_in_it(tmp_path: Path) -> None:
    fill(path := tmp_path / "ledger", 2)
    names = sqlite3.connect(path).execute("SELECT name FROM record ORDER BY id").fetchall()
    assert names == [(f"outcome:{key(0)}",), (f"outcome:{key(1)}",)]


COUNT = 30


@pytest.fixture(scope="module")
def whole_ledger(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    fill(path := tmp_path_factory.mktemp("whole") / "ledger", COUNT)
    return path.read_bytes()


def ends(data: bytes) -> list[int]:
    """Where the bytes of each evaluation's arrays end in the file, the first copy of them."""
    starts = [data.index(np.stack([o.metric, o.kl]).tobytes()) for o in map(outcome, range(COUNT))]
    return [start + 2 * 8 * QUESTIONS + 16 for start in starts]  # its checksum too


def test_cut_at_every_byte_no_evaluation_is_lost_whose_bytes_remain(whole_ledger: bytes) -> None:
    places = ends(whole_ledger)
    for cut in range(len(whole_ledger)):
        names = [record.name for record in recover([whole_ledger[:cut]])]
        kept = sum(name.startswith("outcome:") for name in names)
        assert kept >= sum(place <= cut for place in places)


def cuts(data: bytes) -> list[int]:
    """Every end of an evaluation, page and field of the head, and many places between."""
    edges = {0, 1, 16, 72, 100, *ends(data), *range(0, len(data), 4096)}
    near = {edge + step for edge in edges for step in (-1, 0, 1)}
    drawn = random.Random(4).sample(range(len(data)), 150)
    return sorted(cut for cut in {*near, *drawn} if 0 <= cut < len(data))


def test_a_cut_ledger_is_read_back_and_kept_beside(whole_ledger: bytes, tmp_path: Path) -> None:
    path, places = tmp_path / "ledger", ends(whole_ledger)
    for cut in cuts(whole_ledger):
        path.write_bytes(whole_ledger[:cut])
        found = numbers(path, COUNT)
        assert found >= {n for n, place in enumerate(places) if place <= cut}
        beside = [file for file in tmp_path.iterdir() if file != path]
        assert [file.read_bytes() for file in beside] == ([whole_ledger[:cut]] if cut else [])
        for file in beside:
            file.unlink()
        assert numbers(path, COUNT) == found  # whole again
        assert list(tmp_path.iterdir()) == [path]


def test_what_only_the_journal_still_has_is_read_back(whole_ledger: bytes, tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger", tmp_path / "copy"
    path.write_bytes(whole_ledger)
    other = sqlite3.connect(path, isolation_level=None)
    bodies = other.execute("SELECT body FROM record").fetchall()
    other.execute("BEGIN")
    other.execute("UPDATE record SET name = 'other' WHERE id > 20")
    journal = (tmp_path / "ledger-journal").read_bytes()
    other.close()
    held = sum(body in journal for (body,) in bodies)
    assert held > 5
    for cut in (0, 1, 5000):
        copy.write_bytes(whole_ledger[:cut])
        (tmp_path / "copy-journal").write_bytes(journal)
        assert len(numbers(copy, COUNT)) >= held


def test_what_survived_is_said(whole_ledger: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    for number in (1, 2):
        path.write_bytes(whole_ledger[: -5000 * number])
        with Ledger.open(path, FINGERPRINT) as ledger:
            assert f"{ledger.evaluations} evaluations" in ledger.warnings[0]
            assert f"ledger.damaged-{number}" in ledger.warnings[0]
        with Ledger.open(path, FINGERPRINT) as ledger:
            assert not ledger.warnings


def test_flipped_bits_cost_one_evaluation_and_never_change_one(
    whole_ledger: bytes, tmp_path: Path
) -> None:
    path, draw = tmp_path / "ledger", random.Random(5)
    for place in draw.sample(range(100, len(whole_ledger)), 150):
        data = bytearray(whole_ledger)
        data[place] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        assert len(numbers(path, COUNT)) >= COUNT - 1
    head = bytearray(whole_ledger)
    head[39] += 1  # free pages that are not there: rows are read, but none could be written
    path.write_bytes(head)
    with Ledger.open(path, FINGERPRINT) as ledger:
        assert ledger.evaluations == COUNT
        assert ledger.warnings
    head[:4096] = bytes(4096)
    path.write_bytes(head)
    assert len(numbers(path, COUNT)) == COUNT
