"""Start, join and leave Ray clusters; the only module that knows how Ray is set up."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vtr_export.errors import UnavailableError
from vtr_export.extras import require

SOCKET_SECONDS, JOIN_SECONDS = 5, 15  # an address that is no cluster would hang for minutes
LAST_LINES = 30  # of a dead worker: its stack
STORE_BYTES = 128 << 20  # results are small; Ray would take a third of the memory
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "critical"}
JOIN = f"""
import sys, ray
try:
    ray.init(address=sys.argv[1], **{QUIET})
except Exception as error:
    print(error)
    sys.exit(1)
"""


@dataclass(frozen=True)
class Node:
    """What a machine of the cluster has to give."""

    cpus: float
    gpus: float

    def room(self, cpus: int, gpus: float) -> int:
        """Workers of this size that fit."""
        fit = int(self.cpus // cpus)
        return min(fit, int(self.gpus // gpus)) if gpus else fit


def share_cores(nodes: Sequence[Node], workers: int, gpus: float) -> int:
    """Cores of each worker, so that all find room and none shares a core; 0: there is no room."""
    fair = int(sum(node.cpus for node in nodes) // workers)
    for cores in range(fair, 0, -1):
        if sum(node.room(cores, gpus) for node in nodes) >= workers:
            return cores
    return 0


class Cluster:
    """A connection to Ray; :meth:`close` takes down what this process brought up."""

    def __init__(self, ray: Any, *, ours: bool, folder: Path | None = None) -> None:
        self.ray, self.ours, self.folder = ray, ours, folder  # files of a cluster started here

    def nodes(self) -> list[Node]:
        """Machines that are up."""
        sizes = (node["Resources"] for node in self.ray.nodes() if node["Alive"])
        return [Node(size.get("CPU", 0.0), size.get("GPU", 0.0)) for size in sizes]

    def last_words(self, pid: int | None) -> str:
        """The end of what a worker wrote to stderr; empty where that is not on this machine."""
        sockets = [Path(node["ObjectStoreSocketName"]) for node in self.ray.nodes()]
        logs = (log for socket in sockets for log in socket.parents[1].glob(f"logs/*-{pid}.err"))
        text = "".join(log.read_text(encoding="utf-8", errors="replace") for log in set(logs))
        lines = [line for line in text.splitlines() if not line.startswith((":", "["))]  # Ray's own
        return "\n".join(lines[-LAST_LINES:])

    def close(self) -> None:
        """Leave; a cluster of our own ends with all its processes and files."""
        if self.ours:
            self.ray.shutdown()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def open_cluster(address: str | None, workers: int | None) -> Cluster:
    """Join ``address``, or start a cluster on this machine; a present connection is used as it is.

    Raises UnavailableError if Ray is not installed, or the address does not answer or let us in.
    """
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        os.environ.setdefault(name, "0")  # read when ray is imported
    if address is None:  # Ray listens on every interface: a secret, and none in the home folder
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        if "ray" not in sys.modules:  # else Ray has chosen: token, unless told otherwise
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    ray = _import_ray()
    if address is not None:
        _reach(address)
    if ray.is_initialized():
        return Cluster(ray, ours=False)
    if address is None:
        return _start(ray, workers)
    ray.init(address=address, **QUIET)
    return Cluster(ray, ours=True)


def _import_ray() -> Any:
    ray = require("ray", "cluster", "--ray")
    import ray._private.worker as driver

    if hasattr(driver, "_worker_logs_enabled"):
        driver._worker_logs_enabled = False  # else deaths are told on stdout, where results go
    return ray


def _start(ray: Any, workers: int | None) -> Cluster:
    """A cluster of this machine alone."""
    folder = Path(tempfile.mkdtemp(prefix="vtr-ray-", dir="/tmp"))  # sockets: short names only
    cores = len(os.sched_getaffinity(0))
    cluster = Cluster(ray, ours=True, folder=folder)
    try:
        ray.init(
            address="local",
            num_cpus=workers if workers and workers > cores else None,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            _temp_dir=str(folder),
            **QUIET,
        )
    except BaseException:
        cluster.close()
        raise
    return cluster


def _reach(address: str) -> None:
    """A child joins first and leaves again, for Ray itself waits for minutes."""
    _knock(address)
    try:
        tried = subprocess.run(
            [sys.executable, "-c", JOIN, address],
            capture_output=True,
            text=True,
            timeout=JOIN_SECONDS,
        )
    except subprocess.TimeoutExpired as late:
        said = (late.stderr or b"").decode(errors="replace").strip().rpartition("] ")[2]
        raise _unreachable(address, f"no answer within {JOIN_SECONDS} s. {said}".strip()) from None
    if tried.returncode:
        raise _unreachable(address, tried.stdout.strip() or tried.stderr.strip()[-500:])


def _knock(address: str) -> None:
    """Is anybody listening? ``auto`` is looked up by Ray."""
    if address == "auto":
        return
    url = urlsplit(address if "://" in address else f"//{address}")
    with suppress(ValueError):  # a port that is none
        if url.hostname and url.port:
            try:
                socket.create_connection((url.hostname, url.port), SOCKET_SECONDS).close()
            except OSError as error:
                raise _unreachable(address, str(error)) from None
            return
    raise UnavailableError(
        f"'{address}' is no Ray address",
        where="--ray",
        hint="auto, HOST:6379, ray://HOST:10001, or --ray alone for a cluster on this machine",
    )


def _unreachable(address: str, reason: str) -> UnavailableError:
    if "mismatch" in reason.lower():
        hint = "install the cluster's versions of Ray and Python here, or this one's there"
    elif "ray[client]" in reason.lower() or "grpc" in reason.lower():
        hint = "pip install 'ray[client]', or run this on a node of the cluster with --ray auto"
    elif "uthenticat" in reason:
        hint = "copy the cluster's token here: ~/.ray/auth_token, or RAY_AUTH_TOKEN"
    else:
        hint = (
            "ray status, on the head node, shows whether it is up; HOST:6379 works on nodes of the"
            " cluster alone, ray://HOST:10001 from elsewhere, --ray alone starts one here"
        )
    return UnavailableError(
        f"the Ray cluster '{address}' cannot be joined: {reason}", where="--ray", hint=hint
    )
