"""Parse and build one ONNX file with TensorRT-RTX, without a GPU, and print what came of it.

A process of its own, because the builder may abort:
``python tensorrt_child.py decoder.onnx --vision 32 --keep 16 --sm 86,120 --plugin python``.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import tensorrt_rtx_bindings.tensorrt_rtx as trt

# (least, best, most) of each named dimension; a dimension's stage number plays no part
BATCH = (1, 1, 2)
GENERATION = {"sequence": (1, 1, 1), "vision": (0, 0, 0), "past": (1, 64, 128)}
Range = tuple[int, int, int]


def context(vision: int) -> dict[str, Range]:
    """The profile of a prompt with up to ``vision`` vision tokens."""
    return {
        "sequence": (1, vision + 8, 2 * vision),
        "vision": (0, vision // 2, vision),
        "past": (0, 0, 64),
    }


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps what is worse than a warning."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


def ranges(name: str, axis: int, profile: dict[str, Range]) -> Range:
    """Bounds of an open dimension of input ``name``."""
    if axis == 0:
        return BATCH
    if name.startswith("past"):
        return profile["past"]
    if name in ("attention_mask", "keys", "mask"):
        past, new = profile["past"], profile["sequence"]
        return past[0] + new[0], past[1] + new[1], past[2] + new[2]
    return profile["vision" if name == "vision_index" else "sequence"]


def add_profile(
    builder: Any, config: Any, network: Any, profile: dict[str, Range], keep: int
) -> None:
    wanted = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        shape = tuple(tensor.shape)
        if tensor.is_shape_tensor:
            bounds = (0, keep // 2, keep)
            wanted.set_shape_input(tensor.name, *([bound] * shape[0] for bound in bounds))
            continue
        dims = [
            (dim,) * 3 if dim >= 0 else ranges(tensor.name, axis, profile)
            for axis, dim in enumerate(shape)
        ]
        wanted.set_shape(tensor.name, *zip(*dims, strict=True))
    config.add_optimization_profile(wanted)


def describe(network: Any) -> dict[str, Any]:
    """What a test asks about: layers, and which of them compute or keep what in which type."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kind = {layer.name: str(layer.type).rpartition(".")[2] for layer in layers}
    types: dict[str, Counter[str]] = {}
    for layer in layers:
        first = layer.get_input(0) if layer.num_inputs else layer.get_output(0)
        types.setdefault(kind[layer.name], Counter())[str(first.dtype).rpartition(".")[2]] += 1
    weights = Counter(
        str(output.dtype).rpartition(".")[2]
        for layer in layers
        if kind[layer.name] == "CONSTANT" and len((output := layer.get_output(0)).shape) == 2
    )
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    return {
        "layers": Counter(kind.values()),
        "types": types,
        "matrices": weights,
        "shape_inputs": [tensor.name for tensor in inputs if tensor.is_shape_tensor],
        "factors": [  # of a score's logits
            float(layer.weights.flat[0])
            for layer in map(as_constant, layers)
            if layer is not None and ".factor" in layer.name
        ],
        "plugins": [
            [list(layer.get_output(i).shape) for i in range(layer.num_outputs)]
            for layer in layers
            if kind[layer.name] == "PLUGIN_V3"
        ],
    }


def as_constant(layer: Any) -> Any:
    """A layer that holds numbers, or None."""
    if layer.type != trt.LayerType.CONSTANT:
        return None
    layer.__class__ = trt.IConstantLayer
    return layer


def register(plugin: str) -> None:
    """The Python plugin, or a compiled library."""
    from vtr_export.backends.tensorrt import library
    from vtr_export.backends.tensorrt.plugin import Plugin, in_python

    found = in_python()
    if plugin != "python":
        found = Plugin("library", found.sha256, Path(plugin))
    found.register(library.load("tensorrt-rtx"))


def main(asked: argparse.Namespace) -> dict[str, Any]:
    if asked.plugin:
        register(asked.plugin)
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(asked.path.read_bytes()) or not network.num_outputs:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        return {"errors": [f"{e.node_operator()}: {e.desc()}" for e in errors] or log.errors}
    config = builder.create_builder_config()
    sms = asked.sm.split(",")
    config.num_compute_capabilities = len(sms)
    for number, sm in enumerate(sms):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), number)
    for profile in (context(asked.vision), GENERATION)[: 1 if asked.context else 2]:
        add_profile(builder, config, network, profile, asked.keep)
    plan = builder.build_serialized_network(network, config)
    size_bytes = 0 if plan is None else plan.nbytes
    return {"errors": log.errors, "plan_bytes": size_bytes, **describe(network)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--vision", type=int, default=32, help="most vision tokens of a call")
    parser.add_argument("--keep", type=int, default=16, help="most that a tunable budget keeps")
    parser.add_argument("--context", action="store_true", help="no profile of generation")
    parser.add_argument("--sm", default="86")
    parser.add_argument("--plugin", default="", help="python, or the path of a library")
    return parser.parse_args()


if __name__ == "__main__":
    print(json.dumps(main(arguments())))
