"""Parse and build vision encoders with TensorRT-RTX, without a GPU: a line of JSON for each file.

A process of its own, because the builder may abort: ``python vision_builds_child.py A.onnx …``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx_bindings.tensorrt_rtx as trt
from tensorrt_child import Log

IMAGES = 1, 1, 2  # least, best, most: of every dimension that is open


def build(file: Path) -> dict[str, Any]:
    """What went wrong, and bytes of the plan."""
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(file.read_bytes()):
        errors = [parser.get_error(number) for number in range(parser.num_errors)]
        return {"errors": [f"{e.node_name()}: {e.desc()}" for e in errors] or log.errors}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(number) for number in range(network.num_inputs)):
        bounds = zip(*((d,) * 3 if d >= 0 else IMAGES for d in tensor.shape), strict=True)
        profile.set_shape(tensor.name, *bounds)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return {"errors": log.errors, "plan_bytes": 0 if plan is None else plan.nbytes}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps({"file": name, **build(Path(name))}), flush=True)
