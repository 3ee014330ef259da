"""Ask an artifact about an image with onnxruntime, numpy, Pillow, tokenizers and Jinja2 alone.

python samples/infer_onnxruntime.py ARTIFACT --image scene.png --prompt "which digit is red ?"

For one image as CLIP and SigLIP take it; vtr_export.runtime has batches, sampling and remedies.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image, ImageOps
from tokenizers import Tokenizer

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def open_graph(file: Path, manifest: dict) -> onnxruntime.InferenceSession:
    options, weights = onnxruntime.SessionOptions(), manifest["weights"]
    if weights["mode"] == "link":  # the weights stayed in the checkpoint's shards
        shards = sorted(manifest["source"]["shards"])
        maps = [np.memmap(Path(weights["folder"]) / shard, np.uint8, "r") for shard in shards]
        options.add_external_initializers_from_files_in_memory(shards, maps, [len(m) for m in maps])
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


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


def prompt_text(folder: Path, question: str) -> str:
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    special = {k: v for k, v in read(folder / "tokenizer_config.json").items() if "_token" in k}
    content = [{"type": "image"}, {"type": "text", "text": question}]
    special |= {"messages": [{"role": "user", "content": content}], "add_generation_prompt": True}
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return sandbox.from_string(template).render(special)


def answer(folder: Path, image: Path, question: str, limit: int) -> str:
    manifest, processor = read(folder / "manifest.json"), read(folder / "processor_config.json")
    files = [manifest["graphs"][name] for name in ("vision_encoder", "embed_tokens", "decoder")]
    vision, embed, decoder = (open_graph(folder / file, manifest) for file in files)
    model, tokenizer = manifest["model"], Tokenizer.from_file(str(folder / "tokenizer.json"))
    takes = {port.name: DTYPES[port.type] for port in (*vision.get_inputs(), *decoder.get_inputs())}
    facts = processor.get("image_processor") or read(folder / "preprocessor_config.json")
    pixels = pixel_values(image, facts).astype(takes["pixel_values"])
    (features,) = vision.run(["image_features"], {"pixel_values": pixels})
    place = tokenizer.id_to_token(model["image_token_id"])
    text = prompt_text(folder, question).replace(place, place * (features.size // model["hidden"]))
    ids = np.array([tokenizer.encode(text, add_special_tokens=not text.startswith("<s>")).ids])
    where, length, said = np.flatnonzero(ids[0] == model["image_token_id"]), ids.shape[1], []
    (embeds,) = embed.run(None, {"input_ids": np.where(ids == model["image_token_id"], 0, ids)})
    embeds[0, where] = features.reshape(-1, model["hidden"])
    feeds = {"inputs_embeds": embeds, "vision_index": where[None]}
    feeds["keep"] = np.array([s["keep"]["numerator"] for s in model["stages"][1:]], np.int64)
    for port in decoder.get_inputs():  # an empty cache: each dimension that grows is zero
        if port.name.startswith("past"):
            shape = [1, *(size if isinstance(size, int) else 0 for size in port.shape[1:])]
            feeds[port.name] = np.zeros(shape, takes[port.name])
    while len(said) < limit:  # knows nothing of cuts: every present* becomes the next past*
        feeds["attention_mask"] = np.ones((1, length), np.int64)
        feeds["position_ids"] = np.arange(length)[None, -feeds["inputs_embeds"].shape[1] :]
        values = decoder.run(None, {name: feeds[name] for name in takes if name in feeds})
        for port, value in zip(decoder.get_outputs(), values, strict=True):
            name = port.name.replace("present.", "past_key_values.").replace("present_", "past_")
            feeds[name] = value
        if (token := int(feeds["logits"].argmax())) in model["eos_token_ids"]:
            break
        said.append(token)
        (feeds["inputs_embeds"],) = embed.run(None, {"input_ids": np.array([[token]])})
        feeds["vision_index"], length = np.zeros((1, 0), np.int64), length + 1
    return tokenizer.decode(said)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    print(answer(*vars(parser.parse_args()).values()))
