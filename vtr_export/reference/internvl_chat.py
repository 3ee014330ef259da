"""OpenGVLab's InternVL checkpoints, taken apart as their own code does it (MIT; 2312.14238)."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

RENAMED = (  # pattern → what transformers calls it, in this order
    (r"^vision_model\.encoder\.layers\.", "model.vision_tower.encoder.layer."),
    (r"^vision_model\.embeddings\.class_embedding$", "model.vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$",
     "model.vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.embeddings\.patch_embedding\.",
     "model.vision_tower.embeddings.patch_embeddings.projection."),
    (r"(encoder\.layer\.\d+)\.attn\.proj\.", r"\1.attention.projection_layer."),
    (r"(encoder\.layer\.\d+)\.attn\.", r"\1.attention."),
    (r"(encoder\.layer\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(encoder\.layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"(encoder\.layer\.\d+)\.ls(\d)$", r"\1.lambda_\2"),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.(output|lm_head)\.", "lm_head."),
    (r"^language_model\.model\.tok_embeddings\.", "model.language_model.embed_tokens."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
)  # fmt: skip


def weights(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a folder as transformers' model names them."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            for part, values in _parts(name, tensor, config["llm_config"]):
                for pattern, renamed in RENAMED:
                    part = re.sub(pattern, renamed, part)
                found[part] = values
    return found


def _parts(name: str, tensor: Tensor, text: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Of InternLM2's wqkv, each group's queries, then its key, then its value; of qkv, thirds."""
    if ".attn.qkv." in name:
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            yield name.replace(".qkv.", f".{letter}_proj."), part.contiguous()
    elif ".attention.wqkv." in name:
        heads = text["num_attention_heads"]
        groups = text.get("num_key_value_heads") or heads
        each = heads // groups
        head = len(tensor) // (groups * (each + 2))
        rows = tensor.view(groups, each + 2, head, *tensor.shape[1:])
        for letter, part in (("q", rows[:, :each]), ("k", rows[:, -2]), ("v", rows[:, -1])):
            values = part.reshape(-1, *tensor.shape[1:]).contiguous()
            yield name.replace("attention.wqkv.", f"self_attn.{letter}_proj."), values
    else:
        yield name, tensor


def shuffled(model: Any, version: str) -> Any:
    """``model`` with the pixel shuffle of ``ps_version``: v1 leaves rows and columns exchanged."""
    own = model.model.pixel_shuffle

    def v1(features: Tensor, scale_factor: float) -> Tensor:
        tiles, width, height, channels = features.shape
        low, narrow = int(height * scale_factor), int(width * scale_factor)
        folded = features.reshape(tiles, width, low, -1).transpose(1, 2)
        return folded.reshape(tiles, low, narrow, int(channels / scale_factor**2))

    model.model.pixel_shuffle = v1 if version == "v1" else own
    return model
