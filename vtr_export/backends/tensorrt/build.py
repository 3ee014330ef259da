"""Run the builder in a process of its own: watch it, and say where it died."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, Final

from vtr_export import errors
from vtr_export.backends.tensorrt.child import RESULT, Job
from vtr_export.backends.tensorrt.library import environment
from vtr_export.errors import EngineError
from vtr_export.process import Announce

_OUTERMOST: Final = ("Building engine", "Optimizing graph", "Timing graph nodes")  # worth showing
_WORDS: Final = 300  # characters of the builder's last words


def build_plan(job: Job, announce: Announce | None = None) -> dict[str, Any]:
    """Build ``job.plan``; its bytes, seconds, layers, plugin_layers and the child's peak memory.

    EngineError when TensorRT refuses the graph, fails or dies; OSError when the plan could not be
    written.
    """
    with tempfile.TemporaryDirectory(prefix="vtr-build-") as scratch:
        folder = Path(scratch)
        job.write(folder)
        code, last, said = _run(folder, announce)
        if not (folder / RESULT).is_file():
            raise _death(job, code, last, said)
        result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    if "errno" in result:
        raise OSError(result["errno"], result["message"], str(job.plan))
    if "error" in result:
        kind = getattr(errors, result["error"])
        raise kind(result["message"], where=_place(job, result["where"]), hint=result["hint"])
    return result


def _run(folder: Path, announce: Announce | None) -> tuple[int, str, str]:
    """The child's exit status, the layer it was at, and what it wrote to stderr last."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "vtr_export.backends.tensorrt.child", str(folder), str(writer)]
    with (folder / "words").open("w+b") as words:
        child = subprocess.Popen(
            command,
            pass_fds=[writer],
            env=dict(environment(folder)),
            stdout=words,
            stderr=words,
            stdin=subprocess.DEVNULL,
        )
        os.close(writer)
        try:
            with os.fdopen(reader, encoding="utf-8") as messages:
                last = _watch(messages, announce)
            code = child.wait()
        finally:
            child.kill()
            child.wait()
        return code, last, _tail(words)


def _watch(messages: IO[str], announce: Announce | None) -> str:
    """Pass progress on until the child ends; the last layer it named."""
    last, shown = "", ""
    for line in messages:
        try:
            message = json.loads(line)
        except ValueError:  # the child died in the middle of it
            break
        last = message.get("layer", last)
        phase = message.get("phase")
        if announce is None or phase not in _OUTERMOST or not message.get("of"):
            continue
        percent = 25 * (4 * message.get("step", 0) // message["of"])
        if (text := f"{phase.lower()}, {percent} %") != shown:
            shown = text
            announce(text)
    return last


def _tail(words: IO[bytes]) -> str:
    words.seek(max(0, words.seek(0, os.SEEK_END) - _WORDS))
    return " ".join(words.read().decode(errors="replace").split())


def _death(job: Job, code: int, last: str, said: str) -> EngineError:
    """What to say of a child that left no result."""
    if code == -signal.SIGKILL:
        return EngineError(
            "the builder was killed, most likely because memory ran out",
            where=_place(job, last),
            hint="build on a machine with more memory: about 3.5 times the weights are needed",
        )
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return EngineError(
        f"the builder of {job.target} crashed ({how}){': ' + said if said else ''}",
        where=_place(job, last),
        hint="the old engine is as it was; try --plugin off, or another schedule, and report it",
    )


def _place(job: Job, layer: str) -> str:
    return f"{job.plan.stem}, layer {layer}" if layer else job.plan.stem
