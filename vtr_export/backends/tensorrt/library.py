"""The installed TensorRT, whichever flavour: everything else branches on what it offers."""

import ctypes
import importlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from vtr_export.errors import InputError, UnavailableError

MODULES: Final = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx_bindings", "tensorrt_rtx"),
}  # the wheels' modules, first found first
EXTRAS: Final = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_SHARED_OBJECT: Final = "libtensorrt_rtx.so"  # what the parser of the RTX wheel asks for


@dataclass(frozen=True)
class Library:
    """One flavour: its target's name, its version, its module."""

    target: str
    version: str
    trt: Any

    @property
    def builds_ahead(self) -> bool:
        """Whether it compiles for GPUs that are not here."""
        return hasattr(self.trt, "ComputeCapability")

    @property
    def compute_capabilities(self) -> tuple[int, ...]:
        """What it compiles for ahead of time: 86 is SM 8.6."""
        if not self.builds_ahead:
            return ()
        names = self.trt.ComputeCapability.__members__
        return tuple(sorted(int(name[2:]) for name in names if name.startswith("SM")))


def load(target: str) -> Library:
    """Import the flavour behind ``target``; UnavailableError when it is not there or broken."""
    module = _module(target)
    hint = f"pip install 'vtr-export[{EXTRAS[target]}]'"
    if module is None:
        message = f"target {target} needs {MODULES[target][0]!r}, which is not installed"
        raise UnavailableError(message, hint=hint)
    try:
        trt = importlib.import_module(module)
        return Library(target, trt.__version__, trt)
    except (ImportError, OSError, AttributeError) as error:
        raise UnavailableError(f"{module} does not import: {error}", hint=hint) from error


def is_installed(target: str) -> bool:
    """Whether ``load`` would find something to import; imports nothing."""
    return _module(target) is not None


def device_sm() -> int | None:
    """The compute capability of the first GPU, 86 is SM 8.6; None without driver or GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    asked = ((_MAJOR, major), (_MINOR, minor))
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if any(driver.cuDeviceGetAttribute(ctypes.byref(to), what, device) for what, to in asked):
        return None
    return 10 * major.value + minor.value


def environment(scratch: Path) -> Mapping[str, str]:
    """The variables of a process that may parse plugin nodes.

    The parser of the RTX wheel opens ``libtensorrt_rtx.so``, the wheel ships ``….so.1``, and the
    process dies at the first plugin node. A link in ``scratch`` gives it the name it asks for.
    """
    libraries = find_spec("tensorrt_rtx_libs")
    if libraries is None or libraries.origin is None:
        return dict(os.environ)
    versioned = sorted(Path(libraries.origin).parent.glob(f"{_SHARED_OBJECT}.*"))
    if not versioned:
        return dict(os.environ)
    with suppress(FileExistsError):
        (scratch / _SHARED_OBJECT).symlink_to(versioned[-1])
    path = os.pathsep.join(filter(None, (str(scratch), os.environ.get("LD_LIBRARY_PATH"))))
    return os.environ | {"LD_LIBRARY_PATH": path}


def _module(target: str) -> str | None:
    if target not in MODULES:
        raise InputError(f"{target} builds no engines", hint=f"one of: {', '.join(MODULES)}")
    return next((name for name in MODULES[target] if find_spec(name) is not None), None)
