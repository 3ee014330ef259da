r"""Ask TensorRT engines about an image, with cuda-python, numpy, Pillow and tokenizers alone.

python samples/deploy_tensorrt.py ENGINE --image scene.png \
    --prompt "USER: <image>\nwhich digit is red? ASSISTANT:"

ENGINE is the folder that `vtr build` published. The prompt is taken as written, `<image>` and all.
One row and one image; vtr_export.runtime has batches, chat templates, further turns and remedies.
It has run on a simulation of both libraries only: no GPU was at hand.
"""

import argparse
import hashlib
import importlib
import json
import mmap
from pathlib import Path

import numpy as np
from cuda.bindings import runtime as cudart
from PIL import Image, ImageOps
from tokenizers import Tokenizer

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx_bindings"}
STORED = {
    "FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16, "INT64": np.int64,
}  # fmt: skip  # numpy has no bfloat16: its bits
CONTEXT, GENERATION = 0, 1  # the decoder's two profiles: a prompt; one token after another


def cuda(name: str, *arguments):
    error, *values = getattr(cudart, name)(*arguments)
    if error != cudart.cudaError_t.cudaSuccess:
        raise SystemExit(f"{name}: {error.name}")
    return values[0] if values else None


def copy(to: int, source: int, size_bytes: int, way: str, stream: int) -> None:
    if size_bytes:
        kind = getattr(cudart.cudaMemcpyKind, f"cudaMemcpy{way}")
        cuda("cudaMemcpyAsync", to, source, size_bytes, kind, stream)


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def check(folder: Path, manifest: dict, trt) -> None:
    """Look before a plan is opened, whose code runs: are these the files, is this the machine."""
    for name, expected in manifest["files"].items():
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise SystemExit(f"{folder / name} is not the file that was built")
    attributes = cudart.cudaDeviceAttr
    major = cuda("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, 0)
    minor = cuda("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, 0)
    built = manifest["versions"]["tensorrt"], manifest["sms"]
    if trt.__version__ != built[0] or 10 * major + minor not in built[1]:
        raise SystemExit(f"built by TensorRT {built[0]} for SM {built[1]}")


class Engine:
    """A plan: its weights once, and one execution context for each profile."""

    def __init__(self, file: Path, trt, stream) -> None:
        self.stream, self.turn, self.memory = stream, 0, {}
        self.logger = trt.Logger(trt.Logger.ERROR)  # both must outlive the engine
        self.runtime = trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(file.read_bytes())
        if self.engine is None:
            raise SystemExit(f"TensorRT does not take {file}")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        mode = {name: self.engine.get_tensor_mode(name).name for name in names}
        self.inputs = [name for name in names if mode[name] == "INPUT"]
        self.outputs = [name for name in names if mode[name] == "OUTPUT"]
        self.dtypes = {name: STORED[self.engine.get_tensor_dtype(name).name] for name in names}
        self.contexts = []
        for profile in range(self.engine.num_optimization_profiles):
            context = self.engine.create_execution_context()
            context.set_optimization_profile_async(profile, stream)
            self.contexts.append(context)

    def reserve(self, name: str, size_bytes: int) -> int:
        """Device memory of a name, kept and grown: two for each, so that no output is an input."""
        address, room = self.memory.get((name, self.turn), (0, -1))
        if room < size_bytes:
            if address:
                cuda("cudaFree", address)
            room = max(256, size_bytes * 5 // 4)
            address = int(cuda("cudaMalloc", room))
            self.memory[name, self.turn] = address, room
        return address

    def run(self, profile: int, arrays: dict, cache: dict, wanted: str) -> tuple[np.ndarray, dict]:
        """One output as an array, and where all of them lie: {name: (address, shape)}."""
        context, held = self.contexts[profile], []
        self.turn = 1 - self.turn
        for name in self.inputs:
            if name in cache:  # stays where the last call put it
                address, shape = cache[name]
            else:
                array = np.ascontiguousarray(arrays[name], self.dtypes[name])
                shape, place = array.shape, self.engine.get_tensor_location(name).name
                if place == "HOST":  # a shape tensor: read before anything runs
                    address = array.ctypes.data
                else:
                    address = self.reserve(name, array.nbytes)
                    copy(address, array.ctypes.data, array.nbytes, "HostToDevice", self.stream)
                held.append(array)
            if not context.set_input_shape(name, shape):
                raise SystemExit(f"{name} of shape {shape} is outside of the engine's profile")
            context.set_tensor_address(name, address)
        made = {}
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            size_bytes = int(np.prod(shape)) * np.dtype(self.dtypes[name]).itemsize
            made[name] = self.reserve(name, size_bytes), shape
            context.set_tensor_address(name, made[name][0])
        if not context.execute_async_v3(self.stream):
            raise SystemExit("TensorRT does not run the engine: see its log")
        result = np.empty(made[wanted][1], self.dtypes[wanted])
        copy(result.ctypes.data, made[wanted][0], result.nbytes, "DeviceToHost", self.stream)
        cuda("cudaStreamSynchronize", self.stream)
        return result, made


def pixel_values(file: Path, facts: dict) -> np.ndarray:
    image, size = ImageOps.exif_transpose(Image.open(file)).convert("RGB"), facts["size"]
    if short := size.get("shortest_edge"):
        width, height = (int(short * edge / min(image.size)) for edge in image.size)
        size = {"width": width, "height": height}
    image = image.resize((size["width"], size["height"]), facts["resample"])
    crop = facts["crop_size"] if facts.get("do_center_crop") else size
    left, top = ((size[side] - crop[side]) // 2 for side in ("width", "height"))
    image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    pixels = (np.array(image).astype(np.float64) * facts["rescale_factor"]).astype(np.float32)
    mean, std = (np.array(facts[name], np.float32) for name in ("image_mean", "image_std"))
    return ((pixels - mean) / std).transpose(2, 0, 1)[None]


def aligned(values: list[int]) -> np.ndarray:
    """In memory that begins at a page, as TensorRT wants it of a shape tensor."""
    array = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)[: len(values)]
    array[:] = values
    return array


def answer(folder: Path, image: Path, prompt: str, limit: int, plugin: Path | None) -> str:
    manifest = read(folder / "manifest.json")
    model, trt = manifest["artifact"]["model"], MODULES[manifest["versions"]["target"]]
    trt = importlib.import_module(trt)
    check(folder, manifest, trt)
    if plugin is not None:
        trt.get_plugin_registry().load_library(str(plugin))
    stream = int(cuda("cudaStreamCreate"))
    plans = [folder / each["file"] for each in manifest["engines"]]
    vision, decoder, *compaction = (Engine(file, trt, stream) for file in plans)
    table = np.load(folder / manifest["embeddings"], mmap_mode="r")  # [vocab, D]

    facts = read(folder / "processor_config.json").get("image_processor")
    pixels = pixel_values(image, facts or read(folder / "preprocessor_config.json"))
    if vision.dtypes["pixel_values"] is np.uint16:  # to the nearest bfloat16
        pixels = ((pixels.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    features, _ = vision.run(0, {"pixel_values": pixels}, {}, vision.outputs[0])

    tokenizer, special = (
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        model["image_token_id"],
    )
    place = tokenizer.id_to_token(special)
    text = prompt.replace("\\n", "\n").replace(place, place * features.shape[1])
    ids = np.array(tokenizer.encode(text, add_special_tokens=not text.startswith("<s>")).ids)
    where, length, said, cache, profile = np.flatnonzero(ids == special), len(ids), [], {}, CONTEXT
    embeds = table[np.where(ids == special, 0, ids)][None]
    embeds[0, where] = features[0]
    keep = aligned([stage["keep"]["numerator"] for stage in model["stages"][1:]])
    empty = {  # every dimension that grows is zero
        name: np.zeros([max(size, 0) for size in (1, *decoder.engine.get_tensor_shape(name)[1:])])
        for name in decoder.inputs
        if name.startswith("past")
    }
    while len(said) < limit:  # knows nothing of cuts: every present* becomes the next past*
        feeds = {"inputs_embeds": embeds, "vision_index": where[None], "keep": keep, **empty}
        feeds["attention_mask"] = np.ones((1, length))
        feeds["position_ids"] = np.arange(length)[None, -embeds.shape[1] :]
        logits, made = decoder.run(profile, feeds, cache, "logits")
        cache = {
            name.replace("present.", "past_key_values.").replace("present_", "past_"): value
            for name, value in made.items()
            if name.startswith("present")
        }
        if compaction and profile == CONTEXT:  # once, where the schedule narrows the cache
            cache |= compaction[0].run(0, {}, made, compaction[0].outputs[0])[1]
        if (token := int(logits.argmax())) in model["eos_token_ids"]:
            break
        said.append(token)
        embeds, where, length, profile = table[[[token]]], where[:0], length + 1, GENERATION
    return tokenizer.decode(said)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--plugin", type=Path, help="libvtr_plugins.so, if built with it")
    print(answer(*vars(parser.parse_args()).values()))
