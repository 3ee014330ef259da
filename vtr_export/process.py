"""What this process took of its machine."""

import resource
import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """The most memory this process ever held; what its parent held before does not count."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
