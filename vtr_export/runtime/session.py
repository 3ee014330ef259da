"""What runs: one Protocol, one table of what stands behind it, and ONNX Runtime."""

import ctypes
import importlib
import math
import mmap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vtr_export.errors import ArtifactError, InputError, UnavailableError
from vtr_export.runtime import bfloat16

Array: TypeAlias = NDArray[Any]
Device: TypeAlias = Literal["cpu", "cuda"]

BACKENDS: Final = {
    ".onnx": "vtr_export.runtime.session:OnnxRuntime",
    ".plan": "vtr_export.runtime.tensorrt:TensorRT",
    ".npy": "vtr_export.runtime.embedding:EmbeddingTable",
}  # what runs a file of this kind; imported when one is opened
PROVIDERS: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
PACKAGES: Final = {"cpu": "vtr-export[cpu]", "cuda": "vtr-export[gpu]"}
DTYPES: Final = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64", "tensor(int64)": "int64", "tensor(int32)": "int32",
    "tensor(bool)": "bool", "tensor(uint8)": "uint8",
}  # fmt: skip
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


@dataclass(frozen=True)
class Port:
    """An input or output of a graph; a dimension that varies has a name, or None."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str  # as numpy spells it, or bfloat16


@dataclass(frozen=True)
class Resident:
    """A tensor that stays where the session put it; only that kind of session reads it."""

    value: Any
    shape: tuple[int, ...]


Value: TypeAlias = Array | Resident


class Session(Protocol):
    """A graph with its weights, ready to run."""

    @property
    def inputs(self) -> Mapping[str, Port]:
        """What it takes, by name."""
        ...

    @property
    def outputs(self) -> Mapping[str, Port]:
        """What it gives, by name."""
        ...

    def run(
        self,
        feeds: Mapping[str, Value],
        outputs: Sequence[str] | None = None,
        *,
        resident: Collection[str] = (),
    ) -> dict[str, Value]:
        """Run once. ``outputs`` None means all; those in ``resident`` stay on the device."""
        ...


class OnnxRuntime:
    """ONNX Runtime. Every tensor is bound, so that resident ones never leave their device."""

    def __init__(
        self,
        file: Path,
        *,
        device: Device = "cpu",
        threads: int | None = None,
        shards: Mapping[str, Path] | None = None,
    ) -> None:
        """Open ``file``; ``shards`` are weight files that lie elsewhere, by location name.

        UnavailableError where the device cannot be used, ArtifactError for a file that is gone or
        that this ONNX Runtime does not take, InputError for an option that makes no sense.
        """
        _check(device, threads)
        self._ort = import_runtime(device)
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        mapped = [_Mapped(path) for path in (shards or {}).values()]
        if shards:
            options.add_external_initializers_from_files_in_memory(
                list(shards), [part.data for part in mapped], [len(part.data) for part in mapped]
            )
        self._session = self._open(file, options, device)
        for part in mapped:
            part.close()
        self._device = device
        self.inputs = {port.name: port for port in map(_port, self._session.get_inputs())}
        self.outputs = {port.name: port for port in map(_port, self._session.get_outputs())}

    def run(
        self,
        feeds: Mapping[str, Value],
        outputs: Sequence[str] | None = None,
        *,
        resident: Collection[str] = (),
    ) -> dict[str, Value]:
        """See :class:`Session`."""
        names = list(self.outputs) if outputs is None else list(outputs)
        binding = self._session.io_binding()
        values = {name: self._ort_value(name, value) for name, value in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, self._device if name in resident else "cpu")
        self._session.run_with_iobinding(binding)
        results = zip(names, binding.get_outputs(), strict=True)
        return {name: _result(value, name in resident) for name, value in results}

    def _open(self, file: Path, options: Any, device: Device) -> Any:
        providers = [PROVIDERS[device]]
        try:
            session = self._ort.InferenceSession(str(file), options, providers=providers)
        except _failures() as error:
            if not file.is_file():
                hint = "export or copy the artifact again"
                raise ArtifactError("a graph is missing", where=str(file), hint=hint) from error
            raise ArtifactError(
                f"ONNX Runtime {self._ort.__version__} does not open the graph: {error}",
                where=str(file),
                hint="vtr verify ARTIFACT says whether a file is damaged; opset 24 needs >= 1.24",
            ) from error
        session.disable_fallback()
        if (used := session.get_providers())[0] != PROVIDERS[device]:
            raise UnavailableError(
                f"ONNX Runtime could not start {PROVIDERS[device]} and offers {', '.join(used)}",
                hint="vtr doctor says which CUDA or cuDNN library is missing",
            )
        return session

    def _ort_value(self, name: str, value: Value) -> Any:
        if isinstance(value, Resident):
            return value.value
        array = np.ascontiguousarray(value)
        make = self._ort.OrtValue
        if self.inputs[name].dtype != "bfloat16":
            return make.ortvalue_from_numpy(array.astype(self.inputs[name].dtype, copy=False))
        return make.ortvalue_from_numpy_with_onnx_type(bfloat16.to_bits(array), _BFLOAT16)


def open_session(file: Path, **options: Any) -> Session:
    """Open a file with what runs its kind; ``options`` are those of that class."""
    if (target := BACKENDS.get(file.suffix)) is None:
        raise ArtifactError(
            f"nothing runs a {file.suffix or 'file without a suffix'}",
            where=str(file),
            hint=f"what is known: {', '.join(BACKENDS)}",
        )
    module, _, name = target.partition(":")
    session: Session = getattr(importlib.import_module(module), name)(file, **options)
    return session


def _check(device: str, threads: int | None) -> None:
    if device not in PROVIDERS:
        raise InputError(
            f"no device named {device!r}", hint=f"choose one of: {', '.join(PROVIDERS)}"
        )
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}", hint="give at least 1, or leave it out")


class _Mapped:
    """A file's bytes, mapped rather than read; ONNX Runtime copies what it needs while opening."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.data = memoryview(self._map)

    def close(self) -> None:
        self.data.release()
        self._map.close()


def import_runtime(device: Device) -> Any:
    """The onnxruntime module; UnavailableError where it is missing or lacks the provider."""
    hint = f"pip install '{PACKAGES[device]}'"
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        message = "running an artifact needs onnxruntime, which is not installed"
        raise UnavailableError(message, hint=hint) from error
    available = onnxruntime.get_available_providers()
    if PROVIDERS[device] not in available:
        raise UnavailableError(
            f"this onnxruntime has no {PROVIDERS[device]} (it has {', '.join(available)})",
            hint=f"pip uninstall -y onnxruntime && {hint}",
        )
    return onnxruntime


def check_version(needed: str, device: str) -> None:
    """UnavailableError for an older onnxruntime than ``>=major.minor``."""
    where: Device = "cuda" if device == "cuda" else "cpu"
    installed = import_runtime(where).__version__
    least = [int(part) for part in needed.removeprefix(">=").split(".")]
    if [int(part) for part in installed.split(".")[: len(least)]] < least:
        raise UnavailableError(
            f"this artifact needs onnxruntime {needed}; {installed} computes it wrong, or not",
            hint=f"pip install -U '{PACKAGES[where]}'",
        )


def _failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises while it opens a graph; it has no common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile",
        "NotImplemented", "RuntimeException", "EPFail", "EngineError",
    )  # fmt: skip
    return tuple(getattr(state, name) for name in names if hasattr(state, name))


def _port(node: Any) -> Port:
    return Port(node.name, tuple(node.shape), DTYPES.get(node.type, node.type))


def _result(value: Any, resident: bool) -> Value:
    if resident:
        return Resident(value, tuple(value.shape()))
    if value.element_type() == _BFLOAT16:
        return _from_bfloat16(value)
    array: Array = value.numpy()
    return array


def _from_bfloat16(value: Any) -> Array:
    """A bfloat16 tensor in host memory as float32, which holds it exactly."""
    shape = tuple(value.shape())
    count = math.prod(shape)
    if not count:
        return np.zeros(shape, np.float32)
    bits = np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(value.data_ptr()))
    return bfloat16.from_bits(bits).reshape(shape)
