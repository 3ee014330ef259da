"""What every benchmark needs: children with their peak memory, turns, medians, tables."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
MIB, GIB = 1 << 20, 1 << 30
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Usage:
    """A finished child: seconds from start to end, its peak resident set, its last line as JSON.

    ``cpu_seconds`` are those its own work took, whatever else the machine did.
    """

    seconds: float
    peak_bytes: int
    report: dict[str, Any]
    cpu_seconds: float = 0.0


def child(*command: object) -> Usage:
    """Run a program to its end; SystemExit with its last words when it fails.

    The peak is the kernel's own, of the process and of those it waited for. A child's count
    starts at its parent's size: keep this process small (no torch, no session).
    """
    text = [str(part) for part in command]
    os.sync()  # what earlier steps left to write is not this child's work
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(text, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        lines, words = (_text(file).strip().splitlines() for file in (out, err))
    if process.returncode:
        raise SystemExit("\n".join([f"failed: {shlex.join(text)}", *words[-20:]]))
    busy = usage.ru_utime + usage.ru_stime
    return Usage(seconds, usage.ru_maxrss * 1024, _report(lines), busy)


def python(script: str, *arguments: object, interpreter: str = sys.executable) -> Usage:
    """Run one of this folder's scripts in a process of its own."""
    return child(interpreter, HERE / script, *arguments)


def vtr(*arguments: object) -> Usage:
    """Run the command line in a process of its own; its report is JSON."""
    return child(sys.executable, "-c", "from vtr_export.cli import main; main()", *arguments)


def export(model: Path, out: Path, schedule: Path, **options: str) -> Usage:
    """``vtr export --no-verify`` with further options."""
    extra = [part for name, value in options.items() for part in (f"--{name}", value)]
    return vtr("export", "--model", model, "--schedule", schedule, "--out", out,
               "--no-verify", "--json", *extra)  # fmt: skip


def export_verified(model: Path, out: Path, schedule: Path) -> Usage:
    """``vtr export`` with every gate."""
    return vtr("export", "--model", model, "--schedule", schedule, "--out", out,
               "--verify", "all", "--json")  # fmt: skip


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))


def _report(lines: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def peak_rss_bytes() -> int:
    """Peak resident set of this process so far."""
    return _status("VmHWM")


def rss_bytes() -> int:
    """Resident set of this process now."""
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def folder_bytes(folder: Path) -> int:
    """What a folder's files hold."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def in_turns(
    sides: Mapping[str, Callable[[], Any]], runs: int, *, warmup: bool = True
) -> dict[str, list[Any]]:
    """Results of ``runs`` rounds; every other round goes backwards, a warm-up is thrown away."""
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for number in range(0 if warmup else 1, runs + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            result = sides[name]()
            if number:
                results[name].append(result)
        say(f"round {number} of {runs}" if number else "warm-up")
    return results


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The median over rounds of ``one / other``: what drifts slowly cancels out."""
    return median(a / b for a, b in zip(one, other, strict=True))


def table(rows: Sequence[Sequence[object]]) -> str:
    """Markdown; the first row is the head."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in text) for column in range(len(text[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in text
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def verdict(met: bool) -> str:
    """How a bar was taken."""
    return "met" if met else "MISSED"


def machine() -> str:
    """Processor, cores, memory and versions, in words."""
    from importlib.metadata import PackageNotFoundError, version

    versions = []
    for package in ("onnxruntime", "onnxruntime-gpu", "torch", "transformers"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    cores = len(os.sched_getaffinity(0))
    about = f"{_processor()}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}"
    return ", ".join([about, *versions])


def _processor() -> str:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    features = [f for f in ("avx2", "avx512f", "amx_tile") if f in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())} ({', '.join(features)})"


def head(*facts: str) -> str:
    """The first lines of a report: when, how, where, and what was measured."""
    command = shlex.join(["python", *sys.argv])
    return f"{time.strftime('%Y-%m-%d')} `{command}`\n\n{machine()}; {', '.join(facts)}\n"


def device(args: argparse.Namespace) -> str:
    """Where ONNX Runtime ran."""
    return f"{args.device}, {args.threads} threads"


def say(text: str) -> None:
    """Progress, apart from the report."""
    print(text, file=sys.stderr, flush=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--tiny", action="store_true", help="a toy model: does it still run")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--device", choices=PROVIDERS, default="cpu")
    made.add_argument("--runs", type=int, default=7, help="rounds after the warm-up")
    made.add_argument("--work", type=Path, help="keep models and artifacts here, and reuse them")
    return made


@contextmanager
def work(folder: Path | None) -> Iterator[Path]:
    """A folder for checkpoints and artifacts; one nobody named is deleted at the end."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="vtr-bench-") as made:
        yield Path(made)


def checkpoint(shape: str, folder: Path, dtype: str, *, sparse: bool = False) -> Path:
    """A checkpoint of ``models.SHAPES``, made once."""
    made = folder / f"{shape}-{dtype}{'-sparse' * sparse}"
    if not (made / "model.safetensors.index.json").is_file():
        say(f"write {made.name}")
        python("models.py", shape, made, "--dtype", dtype, *["--sparse"] * sparse)
    return made
