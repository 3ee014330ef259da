"""Ask an artifact through ONNX Runtime's TensorRT-RTX provider. Written for a GPU; not run on one.

python samples/onnxruntime_rtx.py ARTIFACT ENGINE --image scene.png --prompt "which digit is red ?"

ENGINE is what ``vtr build ARTIFACT`` wrote: only the ranges of its inputs are read, which the
provider would else take as 0 to 32,767 in every dimension.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import infer_onnxruntime as plain
import onnxruntime

PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx"
BOUNDS = {"nv_profile_min_shapes": ("least", min), "nv_profile_opt_shapes": ("best", None),
          "nv_profile_max_shapes": ("most", max)}  # fmt: skip


def devices() -> list:
    """The provider's, once its library is loaded (which needs NVIDIA's driver)."""
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as provider
    except ModuleNotFoundError:
        raise SystemExit(f"pip install {PACKAGE}") from None
    name = provider.get_ep_name()
    onnxruntime.register_execution_provider_library(name, provider.get_library_path())
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    if not found:
        raise SystemExit(f"{name} finds no GPU here")
    return found


def ranges(engine: dict, component: str) -> dict[str, str]:
    """Of every input ``name:1x0x128``: one profile that covers those of the engine."""
    (plan,) = [plan for plan in engine["engines"] if plan["component"] == component]
    profiles = [profile["inputs"] for profile in plan["profiles"]]
    options = {}
    for option, (bound, widest) in BOUNDS.items():
        shapes = []
        for name, first in profiles[0].items():
            every = zip(*(inputs[name][bound] for inputs in profiles), strict=True)
            sizes = [widest(each) for each in every] if widest else first[bound]
            shapes.append(f"{name}:{'x'.join(map(str, sizes))}")
        options[option] = ",".join(shapes)
    return options


def opener(engine: dict) -> Callable:
    """``infer_onnxruntime.open_graph`` on the GPU; the embedding table stays on the CPU."""
    found = devices()

    def open_graph(file: Path, manifest: dict) -> onnxruntime.InferenceSession:
        component = {"vision_encoder": "vision_encoder", "decoder_model_merged": "decoder"}
        if file.stem not in component:
            return plain_open(file, manifest)
        if manifest["weights"]["mode"] == "link":
            raise SystemExit("export with --weights copy")
        options = onnxruntime.SessionOptions()
        options.add_provider_for_devices(found, ranges(engine, component[file.stem]))
        return onnxruntime.InferenceSession(file, options)

    plain_open = plain.open_graph
    return open_graph


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()
    plain.open_graph = opener(plain.read(args.engine / "manifest.json"))
    print(plain.answer(args.artifact, args.image, args.prompt, args.max_new_tokens))
