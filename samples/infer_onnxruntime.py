"""Ask an artifact about an image with onnxruntime, numpy, Pillow, tokenizers and Jinja2 alone.

python samples/infer_onnxruntime.py ARTIFACT --image scene.png --prompt "which digit is red ?"

The loop knows nothing of cuts: every `present.X` becomes the next call's `past_key_values.X`, every
`present_mask.J` its `past_mask.J`. For one image prepared as CLIP and SigLIP do; for anything
else, batches, sampling and errors with a remedy use vtr_export.runtime.
"""

import argparse
import json
import mmap
from pathlib import Path

import numpy as np
import onnxruntime
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image, ImageOps
from tokenizers import Tokenizer


def open_graph(folder: Path, manifest: dict, name: str) -> onnxruntime.InferenceSession:
    options, weights = onnxruntime.SessionOptions(), manifest["weights"]
    if weights["mode"] == "link":  # the weights stayed in the checkpoint's shards
        shards = sorted(manifest["source"]["shards"])
        files = [(Path(weights["folder"]) / shard).open("rb") for shard in shards]
        maps = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) for file in files]
        options.add_external_initializers_from_files_in_memory(shards, maps, [len(m) for m in maps])
    path = str(folder / manifest["graphs"][name])
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def pixel_values(path: Path, facts: dict) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    size = facts["size"]
    if (short := size.get("shortest_edge")) is not None:
        width, height = (int(short * edge / min(image.size)) for edge in image.size)
    else:
        width, height = size["width"], size["height"]
    image = image.resize((width, height), facts["resample"])
    if facts.get("do_center_crop"):
        crop = facts["crop_size"]
        left, top = (width - crop["width"]) // 2, (height - crop["height"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    pixels = (np.array(image).astype(np.float64) * facts["rescale_factor"]).astype(np.float32)
    mean, std = (np.array(facts[name], np.float32) for name in ("image_mean", "image_std"))
    return ((pixels - mean) / std).transpose(2, 0, 1)[None]


def prompt_text(folder: Path, question: str) -> str:
    template = folder / "chat_template.jinja"
    if not template.is_file():
        return f"<image>\n{question}"
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    special = {name: token for name, token in config.items() if name.endswith("_token")}
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    compiled = sandbox.from_string(template.read_text(encoding="utf-8"))
    return compiled.render(messages=messages, add_generation_prompt=True, **special)


def answer(folder: Path, image: Path, question: str, limit: int) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    vision, embed, decoder = (
        open_graph(folder, manifest, n) for n in ("vision_encoder", "embed_tokens", "decoder")
    )
    model, tokenizer = manifest["model"], Tokenizer.from_file(str(folder / "tokenizer.json"))
    nested = json.loads((folder / "processor_config.json").read_text()).get("image_processor")
    facts = nested or json.loads((folder / "preprocessor_config.json").read_text())
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    takes = {port.name: dtypes[port.type] for port in (*vision.get_inputs(), *decoder.get_inputs())}
    pixels = pixel_values(image, facts).astype(takes["pixel_values"])
    (features,) = vision.run(None, {"pixel_values": pixels})
    place = tokenizer.id_to_token(model["image_token_id"])
    text = prompt_text(folder, question).replace(place, place * features.shape[1])
    is_begun = text.startswith("<s>")
    ids = np.array([tokenizer.encode(text, add_special_tokens=not is_begun).ids])
    where = np.flatnonzero(ids[0] == model["image_token_id"])
    (embeds,) = embed.run(None, {"input_ids": np.where(ids == model["image_token_id"], 0, ids)})
    embeds[0, where] = features[0]
    feeds = {"inputs_embeds": embeds, "vision_index": where[None]}
    feeds["keep"] = np.array([s["keep"]["numerator"] for s in model["stages"][1:]], np.int64)
    for port in decoder.get_inputs():  # an empty cache: each dimension that grows is zero
        if port.name.startswith("past"):
            shape = [1, *(size if isinstance(size, int) else 0 for size in port.shape[1:])]
            feeds[port.name] = np.zeros(shape, takes[port.name])
    names, length, said = [port.name for port in decoder.get_outputs()], ids.shape[1], []
    while True:
        now = feeds["inputs_embeds"].shape[1]
        feeds["attention_mask"] = np.ones((1, length), np.int64)
        feeds["position_ids"] = np.arange(length - now, length)[None]
        values = decoder.run(names, {name: feeds[name] for name in takes if name in feeds})
        results = dict(zip(names, values, strict=True))
        token = int(results["logits"][0, -1].argmax())
        if token in model["eos_token_ids"]:
            break
        said.append(token)
        if len(said) == limit:
            break
        for name, value in results.items():
            past = name.replace("present_mask", "past_mask").replace("present", "past_key_values")
            feeds[past] = value
        (feeds["inputs_embeds"],) = embed.run(None, {"input_ids": np.array([[token]])})
        feeds["vision_index"], length = np.zeros((1, 0), np.int64), length + 1
    return tokenizer.decode(said)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    given = parser.parse_args()
    print(answer(given.artifact, given.image, given.prompt, given.max_new_tokens))
