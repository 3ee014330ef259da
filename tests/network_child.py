"""Parse ONNX files with TensorRT-RTX and print what their networks hold, as one line of JSON.

A process of its own, because the parser may abort: ``python network_child.py a.onnx b.onnx``.
A file's profiles, if ``a.json`` lies beside it, are offered to the builder; nothing is built.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vtr_export.backends.tensorrt.library import load

QUERY, KEYS, VALUES, MASK = range(4)


def attentions(network: Any) -> list[dict[str, Any]]:
    """Shapes of what each fused attention reads, in order."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return [
        {
            name: list(layer.get_input(index).shape)
            for name, index in (
                ("query", QUERY),
                ("keys", KEYS),
                ("values", VALUES),
                ("mask", MASK),
            )
        }
        for layer in layers
        if layer.type.name == "ATTENTION_INPUT"
    ]


def matrices(network: Any) -> int:
    """Constants with two axes longer than one: weights that something is multiplied by."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    shapes = [layer.get_output(0).shape for layer in layers if layer.type.name == "CONSTANT"]
    return sum(len(shape) == 2 and min(shape) > 1 for shape in shapes)


def offered(trt: Any, builder: Any, profiles: list[dict[str, list[list[int]]]]) -> list[int]:
    """The number each profile gets; -1 for one that is no profile of the network."""
    config, numbers = builder.create_builder_config(), []
    for bounds in profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in bounds.items():
            profile.set_shape(name, *shapes)
        numbers.append(config.add_optimization_profile(profile))
    return numbers


def describe(trt: Any, file: Path) -> dict[str, Any]:
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(file.read_bytes()):
        return {"errors": [parser.get_error(i).desc() for i in range(parser.num_errors)]}
    outputs = (network.get_output(i) for i in range(network.num_outputs))
    profiles = file.with_suffix(".json")
    return {
        "errors": [],
        "attentions": attentions(network),
        "outputs": {tensor.name: list(tensor.shape) for tensor in outputs},
        "matrices": matrices(network),
        "profiles": offered(trt, builder, json.loads(profiles.read_text()))
        if profiles.is_file()
        else [],
    }


if __name__ == "__main__":
    library = load("tensorrt-rtx")
    print(json.dumps([describe(library.trt, Path(name)) for name in sys.argv[1:]]))
