"""Verify an export in a process of its own, whose time and memory are not the export's."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import vtr_export
from vtr_export import errors
from vtr_export.errors import UnavailableError
from vtr_export.manifest import Gate
from vtr_export.reductions.registry import check_references
from vtr_export.schedule import Resolved

_KILLED = (-9, 137)
_NO_MEMORY = ("MemoryError", "bad_alloc", "can't allocate memory", "Failed to allocate memory")


@dataclass(frozen=True)
class Outcome:
    """What a verification found and took. ``golden`` names files in the artifact's golden/."""

    gates: tuple[Gate, ...]
    seconds: float
    peak_rss_bytes: int  # of the child
    golden: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every gate did."""
        return all(gate.passed for gate in self.gates)


def verify_export(
    staging: Path,
    checkpoint: Path,
    schedule: Resolved,
    *,
    dtype: str,
    scope: str = "all",
    image: Path | None = None,
    prompt: str | None = None,
    golden: bool = True,
    trusted: bool = False,
) -> Outcome:
    """Hold the artifact in ``staging`` (it has its manifest) against its checkpoint.

    ``scope`` is ``all`` or ``layers:K``; ``golden`` writes golden vectors into the artifact when
    all of it passes. ``trusted``: the checkpoint's own code may run. Raises VtrError for bad
    input, UnavailableError when memory runs out.
    """
    from vtr_export.verify.check import Job
    from vtr_export.verify.child import FINDINGS, write_job

    check_references(schedule.vision)
    job = Job(
        artifact=staging.absolute(),
        checkpoint=checkpoint.absolute(),
        schedule=schedule,
        dtype=dtype,
        scope=scope,
        image=image.absolute() if image is not None else None,
        prompt=prompt,
        golden=golden,
        trusted=trusted,
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_job(job, Path(folder))
        _run(folder)
        result = json.loads((Path(folder) / FINDINGS).read_text(encoding="utf-8"))
    if "error" in result:
        _raise(result)
    return Outcome(
        gates=tuple(Gate.model_validate(gate) for gate in result["gates"]),
        seconds=round(time.perf_counter() - start, 3),
        peak_rss_bytes=result["peak_rss_bytes"],
        golden=tuple(result["golden"]),
        warnings=tuple(result["warnings"]),
    )


def _run(folder: str) -> None:
    home = str(Path(vtr_export.__path__[0]).parent)
    path = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH")) if part)
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "vtr_export.verify.child", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    starved = done.returncode and any(words in done.stderr for words in _NO_MEMORY)
    if starved or done.returncode in _KILLED:
        raise UnavailableError(
            "the verification ran out of memory" if starved else "the verification was killed",
            hint="verify the first layers only (--verify layers:K), or not at all (--no-verify)",
        )
    if done.returncode:
        raise RuntimeError(f"the verification failed (exit {done.returncode}):\n{done.stderr}")


def _raise(result: dict[str, Any]) -> NoReturn:
    kind = getattr(errors, result["error"], errors.VtrError)
    raise kind(result["message"], where=result["where"], hint=result["hint"])
