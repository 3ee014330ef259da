"""Children that run one function and nothing else."""

import os
from collections.abc import Callable
from typing import Any


def fork(act: Callable[[], Any]) -> int:
    """Begin ``act`` in a child; its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    return pid


def in_child(act: Callable[[], Any]) -> int:
    """Run ``act`` there; the child's wait status."""
    return os.waitpid(fork(act), 0)[1]
