"""A search that is killed anywhere, or whose ledger is cut, ends as if nothing had happened."""

import json
import mmap
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import synthetic_search
from forks import fork
from synthetic_search import SCORE, SPACE, Synthetic, blocks_of, quick_folder, search_on, whole

from vtr_export.search.ledger.ledger import Ledger, key_of

BLOCKS = blocks_of(300, 128)
FILE_CALLS = ("open", "close", "fsync", "ftruncate", "pwrite", "link", "replace", "unlink", "mkdir")


class Counter:
    """Counts in memory that parents share with children."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        return int.from_bytes(self.memory[:8], "little")

    def up(self, *_: object) -> None:
        self.memory[:8] = (self.value + 1).to_bytes(8, "little")


def evaluator(heard: Callable[..., None] = lambda task: None, delay_s: float = 0) -> Synthetic:
    return Synthetic(BLOCKS, noise=0.1, delay_s=delay_s, heard=heard)


def was_killed(pid: int) -> bool:
    """How a child ended; one that failed fails here too."""
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def wait_for(pid: int, made: Counter, count: int) -> None:
    """Until a child has made so many results, or ended."""
    while made.value < count:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.0005)


def stored(path: Path) -> int:
    """Results in a ledger, of blocks and of shards."""
    fingerprint = evaluator().fingerprint()
    with Ledger.open(path, fingerprint) as ledger:
        keys = (key_of(fingerprint, None, whole(i, block)) for i, block in enumerate(BLOCKS))
        return sum(ledger.get_unpruned(key) is not None for key in keys) + ledger.evaluations


Undisturbed = tuple[dict[str, Any], int, bytes]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What a search finds, of how many results, and its ledger."""
    path, made = tmp_path_factory.mktemp("undisturbed") / "ledger", Counter()
    found = search_on(path, evaluator(made.up))
    assert found["schedule"][-1] < found["schedule"][0]
    assert made.value > 30
    return found, made.value, path.read_bytes()


def finishes_alike(path: Path, undisturbed: Undisturbed, cut: bool = False) -> None:
    """The search goes on from what is stored, and ends with the same words.

    A killed one makes what is missing. A ``cut`` ledger may keep later results without earlier
    ones, and a candidate need not be asked all of these again.
    """
    expected, total, _ = undisturbed
    made, known = Counter(), stored(path)
    found = search_on(path, evaluator(made.up))
    spent, whole = found["decoder_flops_spent"], expected["decoder_flops_spent"]
    assert found | {"decoder_flops_spent": whole} == expected
    assert spent <= whole if cut else spent == whole
    assert made.value <= total - known if cut else made.value == total - known


def test_killed_fifty_times_it_loses_one_evaluation_at_most(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    kills, chain = 0, 0
    while kills < 50:
        chain += 1
        draw, path, known = random.Random(chain), tmp_path / f"{chain}", 0
        while kills < 50:
            made, stop = Counter(), draw.randint(0, 10)
            pid = fork(lambda: search_on(path, evaluator(made.up, 0.001)))  # noqa: B023 runs now
            wait_for(pid, made, stop)
            time.sleep(draw.uniform(0, 0.003))
            os.kill(pid, signal.SIGKILL)
            if not was_killed(pid):
                break
            kills += 1
            before, known = known, stored(path)
            assert before + made.value - 1 <= known <= before + made.value
        finishes_alike(path, undisturbed)
    assert chain > 3


def kill_before(number: int) -> Counter:
    """Make the ``number``-th SQL statement or file operation from here on the last."""
    counter, connect = Counter(), sqlite3.connect

    def count(*_: object) -> None:
        counter.up()
        if counter.value == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def traced(*arguments: Any, **named: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **named)
        connection.set_trace_callback(count)
        return connection

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **named: (count(), call(*arguments, **named))[1]

    sqlite3.connect = traced  # type: ignore[assignment]
    for name in FILE_CALLS:
        setattr(os, name, counted(getattr(os, name)))
    return counter


def steps_of(act: Callable[[], Any]) -> int:
    """How many such steps ``act`` takes."""
    total = Counter()

    def child() -> None:
        steps = kill_before(0)
        act()
        total.memory[:] = steps.memory[:]

    assert not was_killed(fork(child))
    return total.value


def test_killed_before_any_step_nothing_is_lost_that_was_put(tmp_path: Path) -> None:
    path, one = tmp_path / "ledger", evaluator()
    shards = [whole(i, block) for i, block in enumerate(BLOCKS)]
    keys = [key_of(one.fingerprint(), SPACE.step(1, 9, SCORE), shard) for shard in shards]

    def work(put: Counter) -> None:
        with Ledger.open(path, one.fingerprint()) as ledger:
            for key, shard in zip(keys, shards, strict=True):
                ledger.put(key, one.evaluate(SPACE.step(1, 9, SCORE), shard))
                put.up()

    total = steps_of(lambda: work(Counter()))
    assert total > 40
    for number in range(1, total + 1):
        path.unlink()
        put = Counter()
        assert was_killed(fork(lambda n=number: (kill_before(n), work(put))))  # noqa: B023 runs now
        with Ledger.open(path, one.fingerprint()) as ledger:
            assert put.value <= ledger.evaluations <= put.value + 1
            assert not ledger.warnings
        assert list(tmp_path.iterdir()) == [path]


def test_killed_while_a_damaged_ledger_is_read_back(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    path, damaged = tmp_path / "ledger", undisturbed[2][:-9000]
    path.write_bytes(damaged)
    survived = stored(path)
    for journal in (b"", b"of a transaction" * 99):
        for number in range(1, 1000):
            for file in tmp_path.iterdir():
                file.unlink()
            path.write_bytes(damaged)
            if journal:
                (tmp_path / "ledger-journal").write_bytes(journal)
            if not was_killed(fork(lambda n=number: (kill_before(n), stored(path)))):
                break
            assert stored(path) == survived
            beside = {file.name for file in tmp_path.iterdir()} - {"ledger"}
            assert any((tmp_path / name).read_bytes() == damaged for name in beside)
            assert not any("tmp" in name or "lock" in name for name in beside)
        assert number > 30


def until_full(path: Path, size_bytes: int) -> bool:
    """Search with files that may not grow beyond ``size_bytes``; whether it was killed for that.

    The write that reaches the limit is cut there, the next one kills.
    """

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))
        search_on(path, evaluator(made.up))

    made = Counter()
    killed = was_killed(fork(limited))
    if killed:
        assert stored(path) >= made.value - 1
    return killed


def test_killed_within_a_write_it_loses_one_evaluation_at_most(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    size = len(undisturbed[2])
    for i, limit in enumerate(random.Random(3).sample(range(size), 30)):
        path = tmp_path / str(i)
        assert until_full(path, limit)
        finishes_alike(path, undisturbed)


def test_a_cut_ledger_ends_with_the_same_schedule(undisturbed: Undisturbed, tmp_path: Path) -> None:
    path, data = tmp_path / "ledger", undisturbed[2]
    for cut in (0, 1, 50, 100, 4096, *random.Random(8).sample(range(len(data)), 30), len(data) - 1):
        path.write_bytes(data[:cut])
        finishes_alike(path, undisturbed, cut=True)


@pytest.fixture(scope="module")
def torn(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A ledger in the middle of a transaction, and the journal that undoes it."""
    folder = tmp_path_factory.mktemp("torn")
    for size in range(len(undisturbed[2]) - 100, 0, -512):
        path = folder / str(size)

        def limited(path: Path = path, size: int = size) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            search_on(path, evaluator())

        assert was_killed(fork(limited))
        journal = folder / f"{size}-journal"
        if journal.stat().st_size and path.stat().st_size == size:
            return path.read_bytes(), journal.read_bytes()
    pytest.fail("no transaction was torn")


@pytest.mark.parametrize("which", ["journal", "ledger"])
def test_a_torn_transaction_is_undone_whatever_is_left_of_it(
    which: str, torn: tuple[bytes, bytes], tmp_path: Path
) -> None:
    ledger, journal = torn
    path, beside = tmp_path / "ledger", tmp_path / "ledger-journal"
    path.write_bytes(ledger)
    beside.write_bytes(journal)
    known = stored(path)
    rows = (
        sqlite3.connect(path)
        .execute("SELECT body FROM record WHERE name NOT LIKE 'note:%'")
        .fetchall()
    )
    data = journal if which == "journal" else ledger
    ends = [0, 1, len(data) - 1, *random.Random(6).sample(range(len(data)), 100)]
    for cut in ends:
        for file in tmp_path.iterdir():
            file.unlink()
        path.write_bytes(ledger[:cut] if which == "ledger" else ledger)
        beside.write_bytes(journal[:cut] if which == "journal" else journal)
        left = ledger[:cut] + journal
        there = known if which == "journal" else sum(body in left for (body,) in rows)
        assert stored(path) >= there


def test_a_killed_program_goes_on(undisturbed: Undisturbed, tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    command = [sys.executable, synthetic_search.__file__, str(path), "300", "1"]
    for results in (1, 20):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not (
                path.exists() and path.read_bytes().count(b"outcome:") >= 2 * results
            ):
                time.sleep(0.005)  # a result has its name twice
            process.kill()
    before = stored(path)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert before > 0
    assert json.loads(done.stdout.splitlines()[-1]) == undisturbed[0]


def test_two_programs_do_not_share_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    made = Counter()
    pid = fork(lambda: search_on(path, evaluator(made.up, 0.2)))
    wait_for(pid, made, 1)
    done = subprocess.run(
        [sys.executable, synthetic_search.__file__, str(path)], capture_output=True, text=True
    )
    assert done.returncode
    assert f"process {pid}" in done.stderr
    os.kill(pid, signal.SIGKILL)
    assert was_killed(pid)
    assert stored(path) >= made.value - 1
