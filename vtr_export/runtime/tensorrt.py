"""A session on a TensorRT engine: cuda-python and numpy, one context for each profile.

TensorRT-RTX finishes its kernels on the GPU it meets: an engine's first calls there are slowest.
No GPU was at hand: what speaks to CUDA and TensorRT ran on a simulation of both only.
"""

import hashlib
import mmap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from vtr_export.backends.tensorrt.library import Library
from vtr_export.errors import ArtifactError, EngineError
from vtr_export.runtime import bfloat16
from vtr_export.runtime.cuda import Cuda
from vtr_export.runtime.device_memory import ALIGNMENT, Block, Pool
from vtr_export.runtime.ranges import Numbers, Profile, Range, choose
from vtr_export.runtime.session import Array, Port, Resident, Value

DTYPES: Final = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32",
    "BOOL": "bool", "UINT8": "uint8", "INT8": "int8",
}  # fmt: skip
_AGAIN: Final = "build it again: vtr build ARTIFACT"


@dataclass(frozen=True)
class Plan:
    """A serialised engine, mapped and found to be what its manifest says."""

    file: Path
    data: mmap.mmap

    @classmethod
    def open(cls, file: Path, sha256: str) -> "Plan":
        """EngineError unless ``file`` has that hash; it is not looked into."""
        try:
            with file.open("rb") as stream:
                data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise EngineError(
                f"the plan cannot be read: {error}", where=str(file), hint=_AGAIN
            ) from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise EngineError(
                "the plan is not the one that was built", where=str(file), hint=_AGAIN
            )
        return cls(file, data)


@dataclass(frozen=True)
class Gpu:
    """What the engines of one folder share: a device, its memory, a TensorRT."""

    library: Library
    cuda: Cuda
    pool: Pool

    @classmethod
    def of(cls, library: Library, cuda: Cuda) -> "Gpu":
        """With a pool of its own."""
        return cls(library, cuda, Pool(cuda.allocate, cuda.free))


@dataclass(frozen=True)
class OnDevice:
    """A tensor in device memory, as the cache is between two calls."""

    block: Block
    dtype: str


@dataclass(frozen=True)
class _Tensor:
    """An input or output of an engine."""

    port: Port
    on_host: bool  # a shape tensor: its values are read before anything runs

    @property
    def stored(self) -> np.dtype[Any]:
        """How numpy holds it."""
        return np.dtype("uint16" if self.port.dtype == "bfloat16" else self.port.dtype)


class TensorRT:
    """An engine on one GPU. Its weights are there once, whatever the number of its profiles."""

    def __init__(self, file: Path, *, data: mmap.mmap, gpu: Gpu) -> None:
        """Deserialise ``data``, the bytes of ``file``: code of it runs, so its folder was checked.

        EngineError where TensorRT refuses it.
        """
        self._gpu, self._where = gpu, str(file)
        self._log = _log(gpu.library.trt)
        self._runtime = gpu.library.trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise self._refusal("does not take the plan")
        self._profiles = _profiles(self._engine)
        self._contexts = [self._context(number) for number in range(len(self._profiles))]
        tensors = _tensors(self._engine)
        self._tensors = {tensor.port.name: tensor for _, tensor in tensors}
        self.inputs = {t.port.name: t.port for is_input, t in tensors if is_input}
        self.outputs = {t.port.name: t.port for is_input, t in tensors if not is_input}
        sizes = map(self._engine.get_device_memory_size_for_profile_v2, range(len(self._profiles)))
        self._scratch_bytes = max(sizes)

    def run(
        self,
        feeds: Mapping[str, Value],
        outputs: Sequence[str] | None = None,
        *,
        resident: Collection[str] = (),
    ) -> dict[str, Value]:
        """See :class:`Session`. Raises InputError for shapes that no profile takes."""
        asked = list(self.outputs) if outputs is None else list(outputs)
        context = self._contexts[self._choose(feeds)]
        held = [self._feed(context, name, feeds[name]) for name in self.inputs]
        if missing := context.infer_shapes():
            raise self._refusal(f"misses the shapes of {', '.join(missing)}")
        made = {name: self._place(context, name) for name in self.outputs}
        scratch = self._gpu.pool.scratch(self._scratch_bytes)
        context.set_device_memory(scratch, self._scratch_bytes)
        if not context.execute_async_v3(self._gpu.cuda.stream):
            raise self._refusal("does not run the engine")
        results = {name: self._result(name, *made[name], name in resident) for name in asked}
        self._gpu.cuda.synchronize()
        del held  # what was fed had to live until here
        return {name: self._plain(name, value) for name, value in results.items()}

    def _choose(self, feeds: Mapping[str, Value]) -> int:
        shapes = {name: tuple(map(int, _shape(feeds[name]))) for name in self.inputs}
        values = {
            name: tuple(np.asarray(feeds[name]).ravel().tolist())
            for name in self.inputs
            if self._tensors[name].on_host
        }
        return choose(self._profiles, shapes, values, self._where)

    def _feed(self, context: Any, name: str, value: Value) -> Any:
        """Bind an input; the answer must live until the call is done."""
        tensor = self._tensors[name]
        if isinstance(value, Resident):
            assert isinstance(value.value, OnDevice)  # another session's are of no use here
            address, held = value.value.block.address, value
        elif tensor.on_host:
            array = aligned(np.shape(value), tensor.stored)
            array[...] = value
            address, held = array.ctypes.data, array  # type: ignore[assignment]
        else:
            array = _as_stored(value, tensor)
            block = self._gpu.pool.take(array.nbytes)
            self._gpu.cuda.upload(array, block.address)
            address, held = block.address, (array, block)  # type: ignore[assignment]
        if not context.set_input_shape(name, tuple(map(int, _shape(value)))):
            raise self._refusal(f"does not take {name} of shape {_shape(value)}")
        context.set_tensor_address(name, address)
        return held

    def _place(self, context: Any, name: str) -> tuple[Any, tuple[int, ...]]:
        """Memory for an output, bound, and its shape; all outputs need some."""
        tensor, shape = self._tensors[name], tuple(map(int, context.get_tensor_shape(name)))
        if min(shape, default=0) < 0:
            raise self._refusal(f"cannot tell the shape of {name} before it runs")
        if tensor.on_host:
            array = aligned(shape, tensor.stored)
            context.set_tensor_address(name, array.ctypes.data)
            return array, shape
        block = self._gpu.pool.take(int(np.prod(shape)) * tensor.stored.itemsize)
        context.set_tensor_address(name, block.address)
        return block, shape

    def _result(self, name: str, made: Any, shape: tuple[int, ...], stays: bool) -> Value:
        """On its way to the host; there after ``synchronize``."""
        tensor = self._tensors[name]
        if isinstance(made, np.ndarray):
            return made
        if stays:
            return Resident(OnDevice(made, tensor.port.dtype), shape)
        array = np.empty(shape, tensor.stored)
        self._gpu.cuda.download(made.address, array)
        return array

    def _plain(self, name: str, value: Value) -> Value:
        """Bits of bfloat16 as the float32 they stand for."""
        if isinstance(value, Resident) or self.outputs[name].dtype != "bfloat16":
            return value
        return bfloat16.from_bits(value)

    def _context(self, number: int) -> Any:
        """One for each profile: switching profiles of one context costs more than two contexts."""
        trt, config = self._gpu.library.trt, self._engine.create_runtime_config()
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        config.set_execution_context_allocation_strategy(strategy)
        if number and hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # in generation a cache grows at every step: it would compile kernels for each length
            none = trt.DynamicShapesKernelSpecializationStrategy.NONE
            config.dynamic_shapes_kernel_specialization_strategy = none
        context = self._engine.create_execution_context(config)
        stream = self._gpu.cuda.stream
        if context is None or not context.set_optimization_profile_async(number, stream):
            raise self._refusal(f"makes no context for profile {number}")
        self._gpu.cuda.synchronize()
        return context

    def _refusal(self, what: str) -> EngineError:
        library = self._gpu.library
        return EngineError(
            f"{library.target} {library.version} {what}: {self._log.why()}",
            where=self._where,
            hint="vtr doctor says what is installed; build on this machine: vtr build ARTIFACT",
        )


def aligned(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """An empty host array that begins where TensorRT wants memory to begin."""
    size_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size_bytes].view(dtype).reshape(shape)


def port_dtype(name: str, where: str) -> str:
    """TensorRT's name of a type as numpy spells it, or bfloat16."""
    if name not in DTYPES:
        raise ArtifactError(f"no tensor of type {name} is known", where=where, hint=_AGAIN)
    return DTYPES[name]


def _tensors(engine: Any) -> list[tuple[bool, _Tensor]]:
    """Each with whether it is an input, in the engine's order."""
    found = []
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        shape = tuple(None if size < 0 else int(size) for size in engine.get_tensor_shape(name))
        dtype = port_dtype(engine.get_tensor_dtype(name).name, name)
        is_input = engine.get_tensor_mode(name).name == "INPUT"
        on_host = engine.get_tensor_location(name).name == "HOST"
        found.append((is_input, _Tensor(Port(name, shape, dtype), on_host)))
    return found


def _profiles(engine: Any) -> list[Profile]:
    tensors = [tensor for is_input, tensor in _tensors(engine) if is_input]
    return [
        Profile(
            {
                t.port.name: _shape_range(engine, t.port.name, number)
                for t in tensors
                if not t.on_host
            },
            {t.port.name: _value_range(engine, t.port.name, number) for t in tensors if t.on_host},
        )
        for number in range(engine.num_optimization_profiles)
    ]


def _shape_range(engine: Any, name: str, number: int) -> Range:
    least, _, most = (tuple(dims) for dims in engine.get_tensor_profile_shape(name, number))
    return Range(least, most)


def _value_range(engine: Any, name: str, number: int) -> Range:
    # the binding's own names for its two arguments are swapped
    least, _, most = (tuple(v) for v in engine.get_tensor_profile_values(number, name))
    return Range(least, most)


def _shape(value: Value) -> Numbers:
    return value.shape if isinstance(value, Resident) else np.shape(value)


def _as_stored(value: Value, tensor: _Tensor) -> Array:
    array = np.asarray(value)
    if tensor.port.dtype == "bfloat16":
        return bfloat16.to_bits(array)
    return np.ascontiguousarray(array, tensor.stored)


def _log(trt: Any) -> Any:
    """A logger that keeps the errors."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

        def why(self) -> str:
            return self.errors[0] if self.errors else "it gives no reason"

    return Log()
