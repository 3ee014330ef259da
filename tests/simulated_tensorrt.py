"""TensorRT and CUDA as far as a session uses them, on a machine without a GPU.

An engine is an ONNX graph that ONNX Runtime runs; device memory is host memory, filled with what
is no number before it is used. Nothing happens before ``synchronize``, as on a stream: what was
released too early, overlaps or was never bound fails there. Not simulated: what kernels compute.
"""

import ctypes
import hashlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime

from vtr_export.backends.tensorrt.library import Library

NAMES = {
    "tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(bfloat16)": "BF16",
    "tensor(int64)": "INT64", "tensor(bool)": "BOOL",
}  # fmt: skip
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "BF16": ml_dtypes.bfloat16, "INT64": np.int64, "BOOL": np.bool_}  # fmt: skip
BFLOAT16 = 16
SCRATCH_BYTES = 1000
STREAM = 7
Bounds = Mapping[str, tuple[Sequence[int], Sequence[int]]]  # least and most


class HostCuda:
    """The face of ``Cuda``, with a queue for a stream."""

    sm, stream = 86, STREAM

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.queue: list[Callable[[], None]] = []
        self.allocations = 0

    def allocate(self, size_bytes: int) -> int:
        raw = np.full(size_bytes + 256, 0xFF, np.uint8)
        address = raw.ctypes.data + -raw.ctypes.data % 256
        self.memory[address] = raw
        self.allocations += 1
        return int(address)

    def free(self, address: int) -> None:
        self.synchronize()
        self.memory.pop(address).fill(0xFF)

    def upload(self, array: np.ndarray, address: int) -> None:
        assert array.flags.c_contiguous
        self.check(address, array.nbytes)
        source, size_bytes = weakref.ref(array), array.nbytes

        def copy() -> None:
            held = source()
            assert held is not None, "an array was dropped before it was uploaded"
            ctypes.memmove(address, held.ctypes.data, size_bytes)

        self.queue.append(copy)

    def download(self, address: int, array: np.ndarray) -> None:
        self.check(address, array.nbytes)
        to = weakref.ref(array)

        def copy() -> None:
            held = to()
            if held is not None:
                ctypes.memmove(held.ctypes.data, address, held.nbytes)

        self.queue.append(copy)

    def synchronize(self) -> None:
        queue, self.queue = self.queue, []
        for step in queue:
            step()

    def check(self, address: int, size_bytes: int) -> None:
        """It lies in memory that is allocated."""
        found = [start for start in self.memory if start <= address]
        assert found, "no such memory"
        start = max(found)
        offset = -self.memory[start].ctypes.data % 256
        assert address + size_bytes <= start + len(self.memory[start]) - offset


def cuda_python(cuda: HostCuda) -> ModuleType:
    """``cuda.bindings.runtime`` on that memory; its names and enumerations are the real ones."""
    from cuda.bindings import runtime

    success, module = (runtime.cudaError_t.cudaSuccess,), ModuleType("runtime")
    to_device = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    sm = {
        runtime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor: cuda.sm // 10,
        runtime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor: cuda.sm % 10,
    }

    def copy(to: int, source: int, size_bytes: int, kind: Any, stream: int) -> tuple[Any, ...]:
        assert int(stream) == STREAM
        cuda.check(to if kind == to_device else source, size_bytes)
        staged = ctypes.string_at(source, size_bytes) if kind == to_device else None
        cuda.queue.append(lambda: ctypes.memmove(to, staged or source, size_bytes))
        return success

    module.__dict__.update(
        {name: each for name, each in vars(runtime).items() if not callable(each) or name[4:5].isupper()}
        | {
            "cudaGetDeviceCount": lambda: (*success, 1),
            "cudaSetDevice": lambda device: success,
            "cudaDeviceGetAttribute": lambda attribute, device: (*success, sm[attribute]),
            "cudaStreamCreate": lambda: (*success, STREAM),
            "cudaStreamCreateWithFlags": lambda flags: (*success, STREAM),
            "cudaStreamSynchronize": lambda stream: (cuda.synchronize(), success)[1],
            "cudaMalloc": lambda size_bytes: (*success, cuda.allocate(size_bytes)),
            "cudaFree": lambda address: (cuda.free(address), success)[1],
            "cudaMemcpyAsync": copy,
        }
    )  # fmt: skip
    return module


@dataclass
class Engine:
    """One graph with its profiles. Inputs named in ``on_host`` are shape tensors."""

    cuda: HostCuda
    session: onnxruntime.InferenceSession
    profiles: Sequence[Bounds]
    on_host: frozenset[str]

    def __post_init__(self) -> None:
        self.ins = {port.name: port for port in self.session.get_inputs()}
        self.outs = {port.name: port for port in self.session.get_outputs()}
        self.ports = self.ins | self.outs
        self.num_io_tensors, self.num_optimization_profiles = len(self.ports), len(self.profiles)

    def get_tensor_name(self, number: int) -> str:
        return list(self.ports)[number]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name="INPUT" if name in self.ins else "OUTPUT")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.ports[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=NAMES[self.ports[name].type])

    def get_tensor_location(self, name: str) -> Any:
        return SimpleNamespace(name="HOST" if name in self.on_host else "DEVICE")

    def get_tensor_profile_shape(self, name: str, number: int) -> list[tuple[int, ...]]:
        assert name not in self.on_host, "values are its profile"
        least, most = self.profiles[number][name]
        return [tuple(least), tuple(most), tuple(most)]

    def get_tensor_profile_values(self, number: int, name: str) -> list[list[int]]:
        assert name in self.on_host
        least, most = self.profiles[number][name]
        return [list(least), list(most), list(most)]

    def get_device_memory_size_for_profile_v2(self, number: int) -> int:
        return SCRATCH_BYTES * (number + 1)

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace()
        config.set_execution_context_allocation_strategy = lambda chosen: setattr(
            config, "strategy", chosen
        )
        return config

    def create_execution_context(self, config: Any = None) -> "Context":
        assert config is None or config.strategy == "user managed"
        return Context(self, config)


class Context:
    """One execution context."""

    def __init__(self, engine: Engine, config: Any) -> None:
        self.engine, self.profile, self.config = engine, 0, config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.out_shapes: dict[str, tuple[int, ...]] = {}
        self.memory = (0, 0)
        self.runs = 0

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        assert stream == STREAM
        self.profile = number
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.out_shapes = {}
        least = most = self.engine.get_tensor_shape(name)
        if name not in self.engine.on_host:
            least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(least) or not all(
            a <= b <= c for a, b, c in zip(least, shape, most, strict=True)
        ):
            return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address
        assert address % 256 == 0
        self.addresses[name] = address
        return True

    def set_device_memory(self, address: int, size_bytes: int) -> None:
        self.memory = address, size_bytes

    def infer_shapes(self) -> list[str]:
        missing = [n for n in self.engine.ins if n not in self.shapes]
        missing += [n for n in self.engine.on_host if n not in self.addresses]
        if not missing:
            feeds = {name: np.zeros(s, self._dtype(name)) for name, s in self.shapes.items()}
            feeds |= {name: self._read(name) for name in self.engine.on_host}
            results = run(self.engine.session, feeds)
            self.out_shapes = {name: value.shape for name, value in results.items()}
        return missing

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if not self.out_shapes:
            assert self.infer_shapes() == []
        return self.out_shapes[name]

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        if self.config is not None:
            enough = self.engine.get_device_memory_size_for_profile_v2(self.profile)
            assert self.memory[1] >= enough
            self.engine.cuda.check(*self.memory)
        self._check_apart()
        addresses, shapes, out_shapes = dict(self.addresses), dict(self.shapes), self.out_shapes
        self.runs += 1

        def compute() -> None:
            feeds = {n: self._read(n, addresses[n], shapes[n]) for n in self.engine.ins}
            for name, value in run(self.engine.session, feeds).items():
                assert value.shape == out_shapes[name]
                value = np.ascontiguousarray(value)
                ctypes.memmove(addresses[name], value.ctypes.data, value.nbytes)

        self.engine.cuda.queue.append(compute)
        return True

    def _check_apart(self) -> None:
        """All in allocated memory; no output on an input, another output or the scratch."""
        spans = [("scratch", *self.memory)]
        for name, shape in (self.shapes | self.out_shapes).items():
            if name in self.engine.on_host:
                continue
            size_bytes = int(np.prod(shape)) * self._dtype(name).itemsize
            self.engine.cuda.check(self.addresses[name], size_bytes)
            spans.append((name, self.addresses[name], size_bytes))
        for name, start, size_bytes in spans:
            for other, begin, length in spans:
                if name != other and name not in self.engine.ins and size_bytes and length:
                    apart = start + size_bytes <= begin or begin + length <= start
                    assert apart, f"{name} overwrites {other}"

    def _dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(NUMPY[self.engine.get_tensor_dtype(name).name])

    def _read(self, name: str, address: int = 0, shape: tuple[int, ...] | None = None) -> Any:
        dtype, shape = self._dtype(name), self.shapes[name] if shape is None else shape
        size_bytes = int(np.prod(shape)) * dtype.itemsize
        raw = ctypes.string_at(address or self.addresses[name], size_bytes)
        return np.frombuffer(raw, dtype).reshape(shape)


def run(session: onnxruntime.InferenceSession, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Run a graph; bfloat16 goes in and comes out as such."""
    binding = session.io_binding()
    make = onnxruntime.OrtValue
    for name, value in feeds.items():
        if value.dtype == ml_dtypes.bfloat16:
            bits = np.ascontiguousarray(value).view(np.uint16)
            bound = make.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16)
        else:
            bound = make.ortvalue_from_numpy(np.ascontiguousarray(value))
        binding.bind_ortvalue_input(name, bound)
    names = [port.name for port in session.get_outputs()]
    for name in names:
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    return {n: _array(v) for n, v in zip(names, binding.get_outputs(), strict=True)}


def _array(value: Any) -> np.ndarray:
    if value.element_type() != BFLOAT16:
        array: np.ndarray = value.numpy()
        return array
    shape = tuple(value.shape())
    raw = ctypes.string_at(value.data_ptr(), 2 * int(np.prod(shape)))
    return np.frombuffer(raw, ml_dtypes.bfloat16).reshape(shape)


@dataclass
class Simulation:
    """A library whose plans are graphs: ``serve`` says which, by the plan's bytes."""

    cuda: HostCuda = field(default_factory=HostCuda)
    known: dict[str, tuple[Any, Sequence[Bounds], frozenset[str]]] = field(default_factory=dict)
    engines: list[Engine] = field(default_factory=list)
    reached: list[str] = field(default_factory=list)  # hashes of what was to be deserialised

    def serve(
        self, plan: bytes, graph: Any, profiles: Sequence[Bounds], on_host: Sequence[str] = ()
    ) -> None:
        """``graph`` (path or bytes) stands behind ``plan``."""
        self.known[hashlib.sha256(plan).hexdigest()] = graph, profiles, frozenset(on_host)

    def library(self, target: str = "tensorrt", version: str = "11.1.0") -> Library:
        """A module with what a session asks of TensorRT."""
        simulation = self

        class ILogger:
            ERROR = 1

            def __init__(self, severity: int = 0) -> None: ...

            def log(self, severity: int, message: str) -> None: ...

        class Runtime:
            def __init__(self, log: Any) -> None:
                self.log_ = log

            def deserialize_cuda_engine(self, data: Any) -> Engine | None:
                key = hashlib.sha256(data).hexdigest()
                simulation.reached.append(key)
                if key not in simulation.known:
                    self.log_.log(1, "Magic tag does not match")
                    return None
                graph, profiles, on_host = simulation.known[key]
                session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
                engine = Engine(simulation.cuda, session, profiles, on_host)
                simulation.engines.append(engine)
                return engine

        strategy = SimpleNamespace(USER_MANAGED="user managed")
        trt = SimpleNamespace(
            ILogger=ILogger,
            Logger=ILogger,
            Runtime=Runtime,
            ExecutionContextAllocationStrategy=strategy,
            DynamicShapesKernelSpecializationStrategy=SimpleNamespace(NONE="none"),
            __version__=version,
        )
        return Library(target, version, trt)
