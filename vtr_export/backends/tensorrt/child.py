"""The process that parses one graph and builds one plan: TensorRT may die in it, and only there."""

import ctypes
import errno
import json
import mmap
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import onnx

from vtr_export.backends.tensorrt.library import Library, load
from vtr_export.backends.tensorrt.plugin import Plugin
from vtr_export.errors import EngineError, VtrError
from vtr_export.process import peak_rss_bytes

JOB, RESULT = "job.json", "result.json"
Say = Callable[[Mapping[str, Any]], None]
_LAYER: Final = re.compile(
    r"(?:Parsing node: |Computing costs for |ForeignNode )(.+?)(?: metadata: |[\x00-\x1f]|$)"
)
_WEIGHTS: Final = re.compile(r"Total Weights Memory: (\d+) bytes")
_LAYER_CHARACTERS: Final = 200
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True)
class Job:
    """One plan to build. Paths are absolute; bounds are [least, best, most] of every input."""

    target: str
    graph: Path
    weights: Mapping[str, Path]  # location in the graph → file
    plan: Path
    profiles: Sequence[Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]]
    sms: tuple[int, ...]
    plugin: Plugin | None = None
    workspace_bytes: int | None = None
    optimization_level: int | None = None

    def write(self, folder: Path) -> None:
        """Put it where the child looks for it."""
        (folder / JOB).write_text(json.dumps(asdict(self), default=str), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Job":
        """The job that was put there."""
        data = json.loads((folder / JOB).read_text(encoding="utf-8"))
        data["weights"] = {name: Path(path) for name, path in data["weights"].items()}
        for name in ("graph", "plan"):
            data[name] = Path(data[name])
        if (found := data["plugin"]) is not None:
            data["plugin"] = Plugin(**found | {"path": Path(found["path"])})
        return cls(**data | {"sms": tuple(data["sms"])})


def build(job: Job, say: Say) -> dict[str, Any]:
    """Build the plan of ``job``; what came of it. Raises EngineError, or dies."""
    library, start = load(job.target), time.perf_counter()
    if job.plugin is not None:
        job.plugin.register(library)
    log = _log(library, say)
    builder = library.trt.Builder(log)
    network = builder.create_network(0)
    parser = library.trt.OnnxParser(network, log)
    with ExitStack() as mapped:
        _parse(parser, network, job, mapped, log)
        config = _config(library, builder, network, job, say)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(
                f"{job.target} {library.version} builds no engine: {log.why()}",
                where=log.last,
                hint="vtr plan --target says what is known not to build; report the rest",
            )
        facts = _describe(network)
        job.plan.write_bytes(memoryview(plan))
    facts["weights_bytes"] = log.weights_bytes
    return {**facts, "bytes": plan.nbytes, "seconds": round(time.perf_counter() - start, 3)}


def _parse(parser: Any, network: Any, job: Job, mapped: ExitStack, log: Any) -> None:
    """Give the parser the graph, and its weights as they lie in mapped files."""
    content = job.graph.read_bytes()
    initializers = onnx.ModelProto.FromString(content).graph.initializer
    addresses = {name: _address(mapped, path) for name, path in job.weights.items()}
    parsed = parser.load_model_proto(content)
    for tensor in initializers:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {each.key: each.value for each in tensor.external_data}
        start = addresses[entry["location"]] + int(entry.get("offset", 0))
        parsed = parsed and parser.load_initializer(tensor.name, start, int(entry["length"]))
    if parsed and parser.parse_model_proto() and network.num_outputs:
        return
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    said = [f"{error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors]
    raise EngineError(
        f"{job.target} does not take the graph: {said[0] if said else log.why()}",
        where=log.last,
        hint="vtr plan --target says what the target takes; export the artifact again",
    )


def _address(mapped: ExitStack, path: Path) -> int:
    with path.open("rb") as file:
        view = mapped.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _config(library: Library, builder: Any, network: Any, job: Job, say: Say) -> Any:
    trt = library.trt
    config = builder.create_builder_config()
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(library, say)
    if library.builds_ahead and job.sms:
        config.num_compute_capabilities = len(job.sms)
        for number, sm in enumerate(job.sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), number)
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    if job.optimization_level is not None:
        config.builder_optimization_level = job.optimization_level
    for bounds in job.profiles:
        config.add_optimization_profile(_profile(builder, network, bounds))
    return config


def _profile(builder: Any, network: Any, bounds: Mapping[str, Sequence[Sequence[int]]]) -> Any:
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(number) for number in range(network.num_inputs)):
        set_bounds = profile.set_shape_input if tensor.is_shape_tensor else profile.set_shape
        set_bounds(tensor.name, *(tuple(shape) for shape in bounds[tensor.name]))
    return profile


def _describe(network: Any) -> dict[str, Any]:
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    kinds = [str(layer.type).rpartition(".")[2] for layer in layers]
    return {"layers": len(kinds), "plugin_layers": kinds.count("PLUGIN_V3")}


def _log(library: Library, say: Say) -> Any:
    """A logger that keeps errors and the layer the builder is at."""
    trt = library.trt

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.last = ""
            self.weights_bytes: int | None = None

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
                say({"error": message})
            elif found := _WEIGHTS.search(message):
                self.weights_bytes = int(found[1])
            elif found := _LAYER.search(message):
                self.last = found[1][:_LAYER_CHARACTERS]
                say({"layer": self.last})

        def why(self) -> str:
            return self.errors[0] if self.errors else "it gives no reason"

    return Log()


def _monitor(library: Library, say: Say) -> Any:
    """Progress of the outermost phase, and the name of the innermost."""
    trt = library.trt

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            say({"phase": phase_name, "of": num_steps})

        def step_complete(self, phase_name: str, step: int) -> bool:
            say({"phase": phase_name, "step": step + 1, "of": self.steps.get(phase_name, 0)})
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


@contextmanager
def _messages(descriptor: int) -> Iterator[Say]:
    """Send lines of JSON to the parent."""
    with os.fdopen(descriptor, "w", encoding="utf-8", buffering=1) as stream:

        def say(message: Mapping[str, Any]) -> None:
            stream.write(json.dumps(message) + "\n")

        yield say


def main(folder: Path, descriptor: int) -> None:
    """Run the job of ``folder``; end with the parent. A refusal is a result."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    result: dict[str, Any]
    with _messages(descriptor) as say:
        try:
            result = build(Job.read(folder), say)
        except VtrError as error:
            place = {"where": error.where, "hint": error.hint}
            result = {"error": type(error).__name__, "message": error.message, **place}
        except OSError as error:
            result = {"errno": error.errno or errno.EIO, "message": error.strerror or str(error)}
    result["peak_rss_bytes"] = peak_rss_bytes()
    (folder / RESULT).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
