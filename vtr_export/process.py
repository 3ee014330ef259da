"""What this process took of its machine, and how that is said."""

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

Announce = Callable[[str], None]


class Clock:
    """Seconds by step, each announced as it begins; ``detail`` is for those who watch one."""

    def __init__(self, announce: Announce | None = None, detail: Announce | None = None) -> None:
        self.announce, self.detail = announce, detail
        self.steps: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """All steps together."""
        return round(sum(self.steps.values()), 3)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        if self.announce is not None:
            self.announce(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.steps[name] = round(time.perf_counter() - start, 3)


def peak_rss_bytes() -> int:
    """The most memory this process ever held; what its parent held before does not count."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def size(count: int) -> str:
    """Bytes as people read them."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def describe(packages: Sequence[str]) -> str:
    """Processor, cores this process may use, memory, and versions, in words."""
    memory = size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    versions = [f"{package} {version(package)}" for package in packages]
    cores = f"{len(os.sched_getaffinity(0))} cores"
    return ", ".join(
        [_processor(), cores, memory, f"Python {platform.python_version()}", *versions]
    )


def _processor() -> str:
    """As the kernel calls it, where it does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
