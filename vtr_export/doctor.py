"""What works on this machine, and the command that mends what does not."""

import importlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from vtr_export import __version__
from vtr_export.checkpoint import find_folder, read_model_facts
from vtr_export.errors import EngineError, UnavailableError
from vtr_export.families import ModelFacts
from vtr_export.memory import get_weight_type, weight_bytes

PYTHONS: Final = (3, 11), (3, 14)
CORE: Final = ("numpy", "onnx", "onnx-ir", "pydantic", "PyYAML", "tokenizers", "Jinja2", "Pillow")
OPTIONAL: Final = {
    "torch": ("export", "export"),
    "transformers": ("export", "export"),
    "safetensors": ("export", "export"),
    "onnxscript": ("export", "export"),
    "optuna": ("search", "search psigmoid"),
    "scipy": ("search", "search"),
    "matplotlib": ("search", "search"),
    "ray": ("cluster", "search --ray"),
}  # wheel → the extra that brings it, the command that needs it
ENGINES: Final = (
    ("TensorRT", "tensorrt", ("tensorrt", "tensorrt-cu13")),
    ("TensorRT-RTX", "tensorrt-rtx", ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13")),
)  # what people call it, the target, the wheels that may bring it
CUDA: Final = ("cuda-bindings", "cuda-python")
PROVIDERS: Final = ("CPUExecutionProvider", "CUDAExecutionProvider")


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``ok`` None: not there, and only some commands need it."""

    name: str
    ok: bool | None
    found: str
    remedy: str = ""

    @property
    def mark(self) -> str:
        """For a table."""
        return {True: "ok", False: "BAD", None: "-"}[self.ok]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Outlook:
    """What exporting a model would meet, said from its config and its files' names alone."""

    folder: str
    model_type: str
    layers: int
    tokens_per_image: int | None
    weight_bytes: dict[str, int]
    memory_bytes: int | None
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Lines of (what, value)."""
        tokens = self.tokens_per_image
        sizes = [f"{count / 2**30:.3g} GiB in {name}" for name, count in self.weight_bytes.items()]
        return [
            ("model", f"{self.folder} ({self.model_type})"),
            ("decoder layers", str(self.layers)),
            ("vision tokens of an image", "vary" if tokens is None else str(tokens)),
            ("copied weights", ", ".join(sizes)),
        ]


def examine() -> list[Check]:
    """Every check, in order; imports onnxruntime, and neither torch nor TensorRT."""
    return [
        _python(),
        Check("vtr-export", True, __version__),
        *(_core(package) for package in CORE),
        _wheels(),
        *_providers(),
        *_optional(),
        *(_engine(*engine) for engine in ENGINES),
        _cuda(),
        _nvcc(),
        *_plugins(),
    ]


def foresee(model: str | Path) -> Outlook:
    """Raises CheckpointError for what could not be exported."""
    from vtr_export.assemble import limits, missing_assets

    folder = find_folder(model)
    facts = read_model_facts(folder)
    sizes = {name: weight_bytes(facts, get_weight_type(name)) for name in ("fp32", "fp16")}
    remarks = [*limits(facts), *missing_assets(folder), *_weights_remarks(folder)]
    return Outlook(
        folder=str(folder),
        model_type=facts.model_type,
        layers=facts.layers,
        tokens_per_image=facts.tokens_per_image,
        weight_bytes=sizes,
        memory_bytes=memory_bytes(),
        remarks=(*remarks, *facts.remarks, _scope_remark(facts)),
    )


def memory_bytes() -> int | None:
    """Physical memory of this machine, if it says."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _python() -> Check:
    least, below = PYTHONS
    found = ".".join(map(str, sys.version_info[:3]))
    fits = least <= sys.version_info[:2] < below
    remedy = "" if fits else f"use Python {least[0]}.{least[1]} to {below[0]}.{below[1] - 1}"
    return Check("python", fits, found, remedy)


def installed(package: str) -> str | None:
    """The version of an installed wheel."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _core(package: str) -> Check:
    found = installed(package)
    remedy = "" if found else f"pip install {package}"
    return Check(package, found is not None, found or "missing", remedy)


def _wheels() -> Check:
    """The two ONNX Runtime wheels overwrite each other's module: one of them must go."""
    cpu, gpu = installed("onnxruntime"), installed("onnxruntime-gpu")
    if cpu and gpu:
        stays, goes = ("gpu", "onnxruntime") if has_gpu() else ("cpu", "onnxruntime-gpu")
        return Check(
            "onnxruntime",
            False,
            f"onnxruntime {cpu} and onnxruntime-gpu {gpu} overwrite each other: remove {goes}",
            f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'vtr-export[{stays}]'",
        )
    if cpu or gpu:
        return Check("onnxruntime", True, f"{cpu} (CPU)" if cpu else f"{gpu} (GPU)")
    extra = "gpu" if has_gpu() else "cpu"
    return Check("onnxruntime", False, "missing: run, verify and bench need it", _install(extra))


def _install(extra: str) -> str:
    return f"pip install 'vtr-export[{extra}]'"


def has_gpu() -> bool:
    """Whether an NVIDIA driver is there."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def _providers() -> list[Check]:
    """What the installed ONNX Runtime offers; a wheel that does not import is said so."""
    if find_spec("onnxruntime") is None:
        return []
    try:
        available = importlib.import_module("onnxruntime").get_available_providers()
    except (ImportError, AttributeError, OSError) as error:
        remedy = "pip install --force-reinstall onnxruntime"
        return [Check("onnxruntime import", False, f"fails: {error}", remedy)]
    checks = []
    for name in PROVIDERS:
        offered = name in available
        needed = name == PROVIDERS[0] or has_gpu()
        remedy = (
            "" if offered or not needed else ("pip uninstall -y onnxruntime && " + _install("gpu"))
        )
        found = "offered" if offered else "not offered"
        checks.append(Check(name, True if offered else None, found, remedy))
    return checks


def _optional() -> list[Check]:
    """Wheels that only some commands need."""
    return [
        Check(
            package,
            True if (found := installed(package)) else None,
            found or f"missing: {command} needs it",
            "" if found else _install(extra),
        )
        for package, (extra, command) in OPTIONAL.items()
    ]


def _engine(name: str, target: str, wheels: Sequence[str]) -> Check:
    from vtr_export.backends.tensorrt.library import EXTRAS, is_installed

    if not is_installed(target):
        return Check(name, None, f"missing: target {target} needs it ({_install(EXTRAS[target])})")
    return Check(name, True, _first(wheels) or "found")


def _first(wheels: Sequence[str]) -> str | None:
    """The version of the first that is installed."""
    return next((found for wheel in wheels if (found := installed(wheel))), None)


def _cuda() -> Check:
    if found := _first(CUDA):
        return Check("cuda-python", True, found)
    return Check("cuda-python", None, f"missing: running engines needs it (pip install {CUDA[0]})")


def _nvcc() -> Check:
    """The CUDA compiler, by its own words."""
    from vtr_export.backends.tensorrt.compile_plugin import find_nvcc

    try:
        nvcc = find_nvcc()
    except UnavailableError:
        return Check("nvcc", None, "missing: only vtr build-plugin needs it")
    except EngineError as error:
        return Check("nvcc", False, error.message, "reinstall the CUDA toolkit")
    return Check("nvcc", True, f"{nvcc.version} ({nvcc.path}), for SM {_listed(nvcc.sms)}")


def _plugins() -> list[Check]:
    """Every compiled plugin that may be there, else the one in Python."""
    from vtr_export.backends.tensorrt import plugin

    checks = []
    for path in plugin.candidates():
        found, why = plugin.read_library(path)
        if found is None:
            checks.append(Check("plugin", False, f"{path} is refused: {why}", "vtr build-plugin"))
        else:
            served = f"SM {_listed(found.sms)} and {' and '.join(found.targets)}"
            checks.append(Check("plugin", True, f"{path}, for {served}"))
    try:
        fallback = plugin.in_python()
    except UnavailableError as error:
        return [*checks, Check("plugin in Python", False, error.message, error.hint)]
    lacks = fallback.why_it_cannot_run()
    does = "builds engines, and runs in them" if lacks is None else f"builds engines; {lacks}"
    return [*checks, Check("plugin in Python", True, does)]


def _listed(sms: Sequence[int]) -> str:
    return ", ".join(f"{sm // 10}.{sm % 10}" for sm in sms)


def _weights_remarks(folder: Path) -> list[str]:
    """What the names of the files tell about the weights."""
    if (folder / "model.safetensors").exists() or list(folder.glob("*.safetensors.index.json")):
        return []
    return ["no safetensors weights here: `vtr plan` works, `vtr export` will not"]


def _scope_remark(facts: ModelFacts) -> str:
    from vtr_export.verify import choose_scope

    scope = choose_scope(facts)
    return f"export verifies {'the whole model' if scope == 'all' else scope} on this machine"
