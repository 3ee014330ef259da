"""Compile the plugin's sources into a library, against the TensorRT headers of this machine."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from vtr_export.backends.tensorrt import kernel
from vtr_export.errors import EngineError, InputError, UnavailableError
from vtr_export.ops.prune import PLUGIN_VERSION, PRUNE
from vtr_export.targets import SMS

HEADER: Final = "NvInferRuntime.h"
SYSTEM_HEADERS: Final = tuple(
    Path(folder)
    for folder in (
        "/usr/include/x86_64-linux-gnu",
        "/usr/include/aarch64-linux-gnu",
        "/usr/include",
        "/usr/local/tensorrt/include",
    )
)
ELEVEN: Final = 11  # what TensorRT-RTX 1.7 loads: libraries compiled against TensorRT 11
_GET_HEADERS: Final = (
    "git clone --depth 1 https://github.com/NVIDIA/TensorRT, then "
    "--tensorrt-root TensorRT (or the headers that came with the TensorRT you run)"
)


@dataclass(frozen=True)
class Built:
    """A library and what its notes say; ``sms`` are compute capabilities times ten."""

    library: Path
    bytes: int
    seconds: float
    sms: tuple[int, ...]
    targets: tuple[str, ...]
    sha256: str
    tensorrt_headers: str
    cuda: str
    plugin: str = PRUNE
    version: str = PLUGIN_VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "library": str(self.library)}


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: where it is, its version, what it compiles for."""

    path: Path
    version: str
    sms: tuple[int, ...]


def compile_plugin(
    sms: tuple[int, ...] = (),
    tensorrt_root: Path | None = None,
    out: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Built:
    """Publish the library for ``sms`` (default: all that nvcc knows) and its notes in ``out``.

    Raises UnavailableError for a missing tool or header, InputError for an SM that nvcc does not
    know, EngineError when it does not compile or cannot be written: the old library stays.
    """
    sources = kernel.sources()
    headers = find_headers(tensorrt_root)
    tensorrt = read_version(headers)
    nvcc, cmake = find_nvcc(), _find_cmake()
    sms = choose_sms(sms, nvcc)
    library = library_in(out)
    started = time.monotonic()
    progress(f"compile for SM {', '.join(map(str, sms))} against TensorRT {tensorrt}")
    with _next_to(library) as folder:
        made = _run_cmake(cmake, nvcc, sources, headers, sms, folder)
        built = Built(
            library,
            made.stat().st_size,
            round(time.monotonic() - started, 1),
            sms,
            targets_of(tensorrt),
            kernel.sha256(),
            tensorrt,
            nvcc.version,
        )
        _publish(made, built)
    return built


def library_in(out: Path | None) -> Path:
    """Where to write: ``out``, else where VTR_PLUGIN_PATH says it is looked for, else our cache."""
    named = os.environ.get("VTR_PLUGIN_PATH")
    if out is None and named is None:
        return kernel.library_path()
    path = (out or Path(named or "")).expanduser()
    return path if path.suffix == ".so" else path / kernel.LIBRARY


def targets_of(tensorrt: str) -> tuple[str, ...]:
    """Which targets load a library that was compiled against these headers."""
    major = int(tensorrt.partition(".")[0])
    return ("tensorrt-rtx", "tensorrt") if major >= ELEVEN else (f"tensorrt-{major}",)


def choose_sms(asked: tuple[int, ...], nvcc: Nvcc) -> tuple[int, ...]:
    """The SMs to compile for; InputError for one that this nvcc does not know."""
    if unknown := [sm for sm in asked if sm not in nvcc.sms]:
        raise InputError(
            f"nvcc {nvcc.version} does not compile for SM {', '.join(map(str, unknown))}",
            where="--sm",
            hint=f"some of: {', '.join(map(str, nvcc.sms))}, or a newer CUDA toolkit",
        )
    return tuple(sorted(set(asked))) or nvcc.sms


def find_nvcc() -> Nvcc:
    """Of CUDACXX, PATH, CUDA_HOME or /usr/local/cuda, in this order; UnavailableError if none."""
    named = os.environ.get("CUDACXX")
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    places = [named] if named else ["nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    found = next((path for place in places if (path := shutil.which(place))), None)
    if found is None:
        raise UnavailableError(
            "no nvcc is found: only it compiles the plugin",
            where=f"CUDACXX={named}" if named else "PATH",
            hint="install a CUDA toolkit 12.8 or later, or set CUDACXX; "
            "vtr build --plugin on needs no nvcc",
        )
    release = re.search(r"release (\d+\.\d+)", _run([found, "--version"]))
    sms = re.findall(r"compute_(\d+)", _run([found, "--list-gpu-arch"]))
    known = tuple(sorted({int(sm) for sm in sms} & SMS.keys()))
    return Nvcc(Path(found), release[1] if release else "unknown", known)


def find_headers(root: Path | None) -> Path:
    """The folder of TensorRT's headers, given its root or itself; UnavailableError if none."""
    named = root or os.environ.get("TENSORRT_ROOT")
    folders = (Path(named) / "include", Path(named)) if named else SYSTEM_HEADERS
    for folder in folders:
        if (folder / HEADER).is_file():
            return folder.resolve()
    raise UnavailableError(
        f"no {HEADER}: the plugin is compiled against TensorRT's headers, which no wheel has",
        where=str(named or "--tensorrt-root"),
        hint=_GET_HEADERS,
    )


def read_version(headers: Path) -> str:
    """``11.1.0`` from NvInferVersion.h; UnavailableError when it does not say."""
    path = headers / "NvInferVersion.h"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    numbers = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        found = re.search(rf"#define (?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE)? (\d+)", text)
        numbers.append(found[1] if found else "")
    if not all(numbers):
        raise UnavailableError(
            "these headers do not say which TensorRT they belong to",
            where=str(path),
            hint=_GET_HEADERS,
        )
    return ".".join(numbers)


def _find_cmake() -> str:
    if (cmake := shutil.which("cmake")) is None:
        raise UnavailableError("no cmake is found", hint="pip install cmake")
    return cmake


@contextmanager
def _next_to(library: Path) -> Iterator[Path]:
    """A scratch folder that leaves nothing behind; EngineError where nothing can be written."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".build-", dir=library.parent)
    except OSError as error:
        raise _unwritable(library, error) from None
    with folder:
        yield Path(folder.name)


def _run_cmake(
    cmake: str, nvcc: Nvcc, sources: Path, headers: Path, sms: tuple[int, ...], folder: Path
) -> Path:
    """The library that CMake made in ``folder``."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = {
        "CMAKE_CUDA_COMPILER": nvcc.path,
        "CMAKE_CUDA_ARCHITECTURES": ";".join(map(str, sms)),
        "TENSORRT_ROOT": headers,
    }
    defines = [f"-D{key}={value}" for key, value in options.items()]
    _run([cmake, "-S", str(sources), "-B", str(folder), *generator, *defines])
    _run([cmake, "--build", str(folder)])
    return folder / kernel.LIBRARY


def _run(command: list[str]) -> str:
    """What it says; EngineError with its first errors when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UnavailableError(
            f"{command[0]} does not start: {error.strerror}", hint="reinstall it"
        ) from None
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()][:5] or lines[-5:]
        raise EngineError(
            "\n".join((f"{Path(command[0]).name} fails with {done.returncode}:", *errors)),
            hint="nvcc must take this C++ compiler, and the headers must be TensorRT 10.0 or later",
        )
    return done.stdout


def _publish(made: Path, built: Built) -> None:
    """Replace library and notes; killed midway, what is left is refused: it has no notes."""
    notes = built.library.with_name(f"{built.library.name}.json")
    written = made.with_name("notes.json")
    try:
        written.write_text(json.dumps(notes_of(built), indent=2) + "\n", encoding="utf-8")
        notes.unlink(missing_ok=True)
        made.replace(built.library)
        written.replace(notes)
    except OSError as error:
        raise _unwritable(built.library, error) from None


def notes_of(built: Built) -> Mapping[str, Any]:
    """What the file beside the library says of it."""
    return {key: value for key, value in built.to_json().items() if key != "library"}


def _unwritable(path: Path, error: OSError) -> EngineError:
    return EngineError(
        f"the library cannot be written: {error.strerror}", where=str(path), hint="give --out"
    )


def summary(built: Built) -> Iterator[str]:
    """For people."""
    megabytes = built.bytes / 2**20
    yield f"wrote {built.library} ({megabytes:.1f} MiB, {built.seconds} s)"
    yield f"SM {', '.join(map(str, built.sms))}; loaded by {', '.join(built.targets)}"
    yield f"compiled by CUDA {built.cuda} against TensorRT {built.tensorrt_headers}; not executed"
