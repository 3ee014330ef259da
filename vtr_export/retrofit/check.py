"""Let another process look at a foreign graph before this one reads it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import vtr_export
from vtr_export.errors import InputError

SECONDS: Final = 120.0


@dataclass(frozen=True)
class Verdict:
    """A graph that may be read."""

    nodes: int
    producer: str
    external: tuple[str, ...]


def check_file(file: Path, seconds: float = SECONDS) -> Verdict:
    """Facts of a graph that is valid, of known operators, and whose weights lie in its folder.

    Raises InputError for any other, also for one that makes the process that looks at it crash,
    hang or run out of memory.
    """
    if not file.is_file():
        raise InputError("no such file", where=str(file), hint="give the decoder's ONNX file")
    found = _look(file, seconds)
    if "refused" in found:
        hint = found["hint"] or "give an ONNX decoder"
        raise InputError(f"the graph is refused: {found['refused']}", where=str(file), hint=hint)
    return Verdict(found["nodes"], found["producer"], tuple(found["external"]))


def _look(file: Path, seconds: float) -> dict[str, Any]:
    home = str(Path(vtr_export.__path__[0]).parent)
    path = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH")) if part)
    command = [sys.executable, "-m", "vtr_export.retrofit.child", str(file.absolute())]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"checking the graph took more than {seconds:g} s",
            where=str(file),
            hint="give an ONNX decoder; onnx.checker.check_model(path) shows what takes so long",
        ) from None
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = None
    if done.returncode or not isinstance(found, dict):
        raise InputError(
            f"checking the graph crashed (exit {done.returncode})",
            where=str(file),
            hint="the file is damaged, or made to do harm: export the decoder again",
        )
    return found
