"""LLaVA checkpoints of a wanted shape: a config and random or empty weights, written as streams.

python samples/bench/models.py llava-1.4b /tmp/llava --dtype fp16

Random weights keep activations near one. ``--sparse`` writes zeros that take no disk: fine for
whatever moves weights and never multiplies them.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]

NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}  # as safetensors spells them
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
CHUNK = 1 << 22  # values drawn at a time
CLIP_L_336 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
              "num_attention_heads": 16, "image_size": 336, "patch_size": 14}  # fmt: skip
SMALL_336 = CLIP_L_336 | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                          "num_attention_heads": 4}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The two configs of a LLaVA; 576 vision tokens where the tower sees 336 pixels."""

    vision: Mapping[str, int]
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 32000

    def text(self) -> dict[str, Any]:
        """The decoder's part of the config."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
        }


SHAPES = {
    # seconds everywhere; its tower gives 16 tokens
    "tiny": Shape(SMALL_336 | {"image_size": 56}, 64, 128, 6, 4, 2, vocab=128),
    # 322 M parameters without the embedding table: what a prefill on a CPU can be measured with
    "decoder-300m": Shape(SMALL_336, 1024, 3072, 24, 16, 4),
    # CLIP-L/336 and a 22-layer 2048-wide grouped-query decoder
    "llava-1.4b": Shape(CLIP_L_336, 2048, 5632, 22, 32, 4),
    "llava-7b": Shape(CLIP_L_336, 4096, 11008, 32, 32, 32, vocab=32064),
}


def build(name: str, folder: Path, dtype: str, *, sparse: bool = False, shard_gb: float = 5) -> int:
    """Write the checkpoint; returns its parameters."""
    shapes = _describe(SHAPES[name], folder, dtype)
    shards = list(_split(shapes, BYTES[dtype], int(shard_gb * 1e9)))
    weight_map = {}
    generator = np.random.default_rng(0)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write(folder / file, shard, dtype, None if sparse else generator)
        weight_map |= dict.fromkeys(shard, file)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": parameters * BYTES[dtype]}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parameters


def _describe(shape: Shape, folder: Path, dtype: str) -> Shapes:
    """Write config.json; every tensor's hub name and shape, from transformers' own model."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    tokens = (shape.vision["image_size"] // shape.vision["patch_size"]) ** 2
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape.vision, projection_dim=shape.vision["hidden_size"]),
        text_config=LlamaConfig(**shape.text()),
        image_token_index=4,
        image_seq_length=tokens,
        dtype={"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype],
        architectures=["LlavaForConditionalGeneration"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    return {_hub_name(name): tuple(value.shape) for name, value in model.state_dict().items()}


def _hub_name(name: str) -> str:
    """A parameter's name as llava-hf's checkpoints spell it."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("vision_tower.") and ".vision_model." not in name:
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


def _split(shapes: Shapes, size: int, limit: int) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    used = 0
    for name, shape in shapes.items():
        count = math.prod(shape) * size
        if shard and used + count > limit:
            yield shard
            shard, used = {}, 0
        shard[name] = shape
        used += count
    yield shard


def _write(file: Path, shapes: Shapes, dtype: str, generator: np.random.Generator | None) -> None:
    """One safetensors file; without a generator its data is a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        if generator is None:
            out.truncate(8 + len(text) + end)
            return
        for name, shape in shapes.items():
            for part in _draw(name, shape, generator):
                out.write(_bits(part, dtype))


def _draw(
    name: str, shape: tuple[int, ...], generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Norms of one, biases of zero, matrices of unit gain."""
    count = math.prod(shape)
    for start in range(0, count, CHUNK):
        part = min(CHUNK, count - start)
        if len(shape) > 1:
            fan_in = 1 if "embed_tokens" in name else count // shape[0]
            yield generator.standard_normal(part, np.float32) / np.float32(math.sqrt(fan_in))
        else:
            yield np.full(part, name.endswith("weight"), np.float32)


def _bits(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype({"fp32": np.float32, "fp16": np.float16}[dtype]).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=BYTES, default="fp32")
    parser.add_argument("--sparse", action="store_true", help="zeros that take no disk")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print(f"{build(args.shape, args.folder, args.dtype, sparse=args.sparse):,} parameters")


if __name__ == "__main__":
    main()
