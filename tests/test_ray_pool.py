"""The Ray pool on a real cluster of two workers: results, deaths, errors, ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from ray_evaluators import Rigged

from vtr_export.errors import InputError, UnavailableError
from vtr_export.search.candidate import Candidate, Score
from vtr_export.search.evaluator import Outcome, Shard, Unpruned
from vtr_export.search.gsearch import Found, floors, gsearch, levels_of
from vtr_export.search.ledger.ledger import Ledger
from vtr_export.search.questions.calibration import CalibrationSet
from vtr_export.search.questions.metrics import get_metric
from vtr_export.search.runner import Progress, Runner
from vtr_export.search.workers import ray_cluster, ray_pool
from vtr_export.search.workers.pool import Inline, Pool, Task
from vtr_export.search.workers.ray_cluster import Node, open_cluster, share_cores
from vtr_export.search.workers.ray_pool import RayPool

HERE = Path(__file__).parent
BLOCKS = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray on this machine; pools of this process use it."""
    pytest.importorskip("ray", reason="pip install 'vtr-export[cluster]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)  # workers import the evaluator
        started = open_cluster(None, 2)
        yield started
        started.close()


@pytest.fixture
def pool(cluster: Any, tmp_path: Path) -> Iterator[RayPool]:
    opened = two_workers(tmp_path)
    yield opened
    opened.close()


def two_workers(folder: Path, **options: Any) -> RayPool:
    options = {"address": None, "workers": 2, "blocks": BLOCKS} | options
    return RayPool(partial(Rigged, folder), **options)


def candidate(keep: int) -> Candidate:
    return Candidate((8, keep), Score(), 8)


def task(block: int, keep: int | None) -> Task:
    """A shard of three questions; without ``keep``, unpruned."""
    shard = Shard.of(block, (2, 0, 1), ("c", "a", "b"))
    return Task(shard, None if keep is None else candidate(keep))


def results(pool: Pool, tasks: list[Task]) -> dict[Task, Outcome | Unpruned]:
    for one in tasks:
        pool.submit(one)
    return dict(pool.collect() for _ in tasks)


EVERYTHING = [task(block, keep) for keep in (6, 4, 2) for block in range(BLOCKS)]


def assert_as_inline(got: dict[Task, Outcome | Unpruned], folder: Path) -> None:
    expected = results(Inline(Rigged(folder)), EVERYTHING)
    assert got.keys() == expected.keys()
    for one, outcome in expected.items():
        assert np.array_equal(got[one].metric, outcome.metric)


def owners(pool: Pool) -> dict[int, int]:
    """The process that answers each block."""
    answered = results(pool, [task(block, None) for block in range(BLOCKS)])
    return {one.shard.block: result.decoder_flops for one, result in answered.items()}


def test_results_are_those_of_one_process_and_blocks_stay_with_their_worker(
    pool: RayPool, tmp_path: Path
) -> None:
    before = owners(pool)
    assert len(set(before.values())) == pool.workers == 2
    assert_as_inline(results(pool, EVERYTHING), tmp_path)
    assert owners(pool) == before


def test_a_worker_killed_midway_changes_nothing(pool: RayPool, tmp_path: Path) -> None:
    before = owners(pool)
    pool.settle(candidate(6), 1)
    (tmp_path / "slow").touch()
    for one in EVERYTHING:
        pool.submit(one)
    got = dict([pool.collect()])
    os.kill(before[0], signal.SIGKILL)
    pool.settle(candidate(4), 1)
    (tmp_path / "slow").unlink()
    got |= dict(pool.collect() for _ in EVERYTHING[1:])
    assert_as_inline(got, tmp_path)
    after = owners(pool)
    assert after[0] == after[2] != before[0]
    assert after[1] == after[3] == before[1]
    for block in range(BLOCKS):  # the new worker heard what its predecessor had heard
        assert results(pool, [task(block, 1)])[task(block, 1)].decoder_flops == 2


def test_a_worker_that_dies_again_and_again_ends_the_search(pool: RayPool, tmp_path: Path) -> None:
    (tmp_path / "crash").touch()
    pool.submit(task(0, 6))
    with pytest.raises(UnavailableError, match="the last words") as caught:
        pool.collect()
    assert "ledger" in caught.value.hint


def test_blocks_of_a_worker_that_finds_no_place_go_to_another(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = two_workers(tmp_path)
    before = owners(pool)
    monkeypatch.setattr(ray_pool, "PLACEMENT_SECONDS", 2.0)
    free = int(cluster.ray.available_resources().get("CPU", 0))

    @cluster.ray.remote(num_cpus=free + 1)
    class Greedy:
        def there(self) -> None:
            pass

    greedy = Greedy.remote()
    waiting = greedy.there.remote()  # until the first worker's cores are free
    time.sleep(0.5)
    os.kill(before[0], signal.SIGKILL)
    assert_as_inline(results(pool, EVERYTHING), tmp_path)
    assert set(owners(pool).values()) == {before[1]}
    assert pool.workers == 1
    cluster.ray.get(waiting)
    cluster.ray.kill(greedy)
    pool.close()


def test_cancelled_tasks_do_not_start(pool: RayPool, tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    for keep in (6, 4):
        for block in range(BLOCKS):
            pool.submit(task(block, keep))
    pool.cancel(candidate(4))
    last = task(0, 2)
    pool.submit(last)
    seen = [pool.collect()[0].candidate for _ in range(BLOCKS + 1)]
    assert candidate(4) not in seen
    assert candidate(2) in seen


def test_what_waits_behind_a_result_can_be_cancelled_by_who_sees_it(pool: RayPool) -> None:
    for keep in (6, 4):
        pool.submit(task(0, keep))
    assert pool.collect()[0].candidate == candidate(6)
    pool.cancel(candidate(4))
    with pytest.raises(IndexError):
        pool.collect()


@pytest.mark.parametrize(
    ("mishap", "error", "told"),
    [("mistake", InputError, "a.jsonl:3(.|\n)*take another"), ("bug", RuntimeError, "in mishap")],
)
def test_an_evaluators_error_reaches_the_driver(
    pool: RayPool, tmp_path: Path, mishap: str, error: type[Exception], told: str
) -> None:
    (tmp_path / mishap).touch()
    pool.submit(task(1, 6))
    with pytest.raises(error, match=told):
        pool.collect()
    (tmp_path / mishap).unlink()
    assert len(results(pool, EVERYTHING)) == len(EVERYTHING)  # the worker lives


def test_workers_must_hold_the_drivers_model(cluster: Any, tmp_path: Path) -> None:
    other = Rigged(tmp_path / "other").fingerprint()
    pool = two_workers(tmp_path, fingerprint=other)
    pool.submit(task(0, None))
    with pytest.raises(InputError, match="questions"):
        pool.collect()
    pool.close()


def test_too_many_workers_are_refused(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="fit"):
        two_workers(tmp_path, gpus_per_worker=64.0)


def test_a_cluster_is_joined_by_its_address(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "JOIN_SECONDS", 120)  # whatever else this machine does
    address = cluster.ray.get_runtime_context().gcs_address
    pool = two_workers(tmp_path, address=address)
    assert_as_inline(results(pool, EVERYTHING), tmp_path)
    pool.close()


def test_an_address_where_nobody_listens_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UnavailableError, match="refused"):
        open_cluster(f"127.0.0.1:{port}", 2)


def test_an_address_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "JOIN_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UnavailableError, match="answer"):
            open_cluster(address, 2)


def test_without_ray_the_way_to_get_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    with pytest.raises(UnavailableError) as caught:
        open_cluster("auto", 2)
    assert caught.value.hint == "pip install 'vtr-export[cluster]'"


@pytest.mark.parametrize("address", ["cluster", "host:port", "ray://", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UnavailableError, match="no Ray address"):
        open_cluster(address, 2)


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "cores"),
    [
        ([Node(8, 0)], 2, 0, 4),
        ([Node(8, 0), Node(4, 0)], 2, 0, 4),  # six would leave one without a place
        ([Node(4, 0), Node(16, 2), Node(16, 2)], 4, 1, 8),
        ([Node(2, 0)], 3, 0, 0),
        ([Node(64, 1)], 2, 1, 0),
        ([Node(64, 1)], 2, 0.5, 32),
    ],
)
def test_cores_are_shared_so_that_all_find_room(
    nodes: list[Node], workers: int, gpus: float, cores: int
) -> None:
    assert share_cores(nodes, workers, gpus) == cores


@pytest.fixture
def questions(tmp_path: Path) -> CalibrationSet:
    """Twelve questions about pictures of noise."""
    random = np.random.default_rng(0)
    lines = []
    for number in range(12):
        noise = random.integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": "which digit is red ?"}))
    (tmp_path / "q.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return CalibrationSet.load(tmp_path / "q.jsonl", labels=False)


def test_gsearch_ends_as_in_one_process_though_a_worker_is_killed(
    cluster: Any, checkpoint: Path, questions: CalibrationSet, tmp_path: Path
) -> None:
    from vtr_export.search.evaluators.torch_evaluator import TorchEvaluator

    metric = get_metric("agreement")
    blocks = [questions.questions[start : start + 4] for start in range(0, 12, 4)]
    make = partial(TorchEvaluator, checkpoint, blocks, metric, max_new_tokens=6)
    local = make()

    def search(pool: Pool, ledger: str, progress: Any = lambda progress: None) -> Found:
        hashes = [[question.sha256 for question in block] for block in blocks]
        with Ledger.open(tmp_path / ledger, {}) as kept:
            runner = Runner(pool, local.space, flops, hashes, metric, kept, progress)
            unpruned = runner.unpruned().metric
            assert unpruned is not None
            floor = floors(unpruned, 0.2, range(1, local.space.layers), "even")
            levels = levels_of(local.space.parts, 4)
            return gsearch(runner, local.space, Score(query="text"), floor=floor, levels=levels)

    expected = search(Inline(local), "inline.db")
    assert local.space.parts > expected.candidate.keeps[-1] > 0  # something was decided
    pool = RayPool(make, address=None, workers=2, blocks=len(blocks))
    killed = []

    def kill_once(progress: Progress) -> None:
        if not killed and not progress.candidate.is_unpruned and progress.done:
            killed.append(pool.slots[0].present.pid)
            os.kill(killed[0], signal.SIGKILL)

    found = search(pool, "ray.db", kill_once)
    assert found.candidate == expected.candidate
    assert [(one.keep, one.passed) for one in found.tries] == [
        (one.keep, one.passed) for one in expected.tries
    ]
    assert pool.slots[0].present is not None
    assert [pool.slots[0].present.pid] != killed != []
    pool.close()


def flops(candidate: Candidate, shard: Shard) -> int:
    return sum(candidate.keeps) * len(shard)


SEARCH = """
import sys
from functools import partial
from pathlib import Path
from ray_evaluators import Rigged
from test_ray_pool import RayPool, task
pool = RayPool(partial(Rigged, Path(sys.argv[1])), address=None, workers=2, blocks=2)
try:
    pool.submit(task(0, None))
    pool.collect()
    print(pool.cluster.folder, flush=True)
    while True:
        pool.submit(task(0, 6))
        pool.collect()
finally:
    pool.close()
"""


@pytest.fixture
def searching(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A search that never ends; it does when the test does."""
    pytest.importorskip("ray", reason="pip install 'vtr-export[cluster]'")
    child = subprocess.Popen(
        [sys.executable, "-c", SEARCH, tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        start_new_session=True,
    )
    yield child
    child.kill()
    child.communicate()


def descendants(pid: int) -> dict[psutil.Process, list[str]]:
    """Each with its name and command; some end while they are asked."""
    found = {}
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found[process] = [process.name(), *process.cmdline()]
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_an_interrupted_search(
    searching: subprocess.Popen[str], how: signal.Signals
) -> None:
    child = searching
    assert child.stdout is not None
    folder = child.stdout.readline().strip()
    words = descendants(child.pid)
    assert any(folder in word for said in words.values() for word in said)
    family = [  # Ray's agents linger a minute
        process for process, said in words.items() if how == signal.SIGINT or "Agent" not in said[0]
    ]
    if how == signal.SIGINT:
        os.killpg(child.pid, how)  # as a terminal does
    else:
        os.kill(child.pid, how)
    out, err = child.communicate(timeout=60)
    assert child.returncode == -how
    assert not out
    assert how == signal.SIGKILL or err.rstrip().endswith("KeyboardInterrupt")
    assert not psutil.wait_procs(family, timeout=30)[1]
    assert how == signal.SIGKILL or not Path(folder).exists()
