"""Tiny random DeepSeek-VL and Janus models with their processors."""

from pathlib import Path
from typing import Any

import tiny_models
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLImageProcessorPil,
    DeepseekVLProcessor,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessorPil,
    JanusProcessor,
    PreTrainedModel,
)

IMAGE, PATCH = 30, 6
TOKENS = (IMAGE // PATCH) ** 2
NAMED = {"image_token": "<image>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", *NAMED.values())
SIZES = {"size": {"height": IMAGE, "width": IMAGE}, "min_size": 5}


def vision_sizes() -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }


def deepseek_config(**options: Any) -> DeepseekVLConfig:
    return DeepseekVLConfig(
        text_config={"model_type": "llama", **tiny_models.TEXT},
        vision_config={
            "model_type": "siglip_vision_model", "intermediate_size": 24,
            "vision_use_head": False, **vision_sizes(),
        },
        image_token_id=SPECIAL.index("<image>"),
        **options,
    )  # fmt: skip


def janus_config(**vision: Any) -> JanusConfig:
    return JanusConfig(
        text_config={"model_type": "llama", **tiny_models.TEXT},
        vision_config={"mlp_ratio": 1.5, "projection_dim": 32, **vision_sizes(), **vision},
        vq_config={
            "embed_dim": 8, "num_embeddings": 16, "base_channels": 32, "latent_channels": 32,
            "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_patches": 4,
            "image_token_embed_dim": 32, "projection_dim": 32, "num_hidden_layers": 1,
        },
        image_token_id=SPECIAL.index("<image>"),
    )  # fmt: skip


def save(model: PreTrainedModel, processor: Any, images: Any, folder: Path, seed: int) -> Any:
    raw = tiny_models.whole_words(SPECIAL)
    made = processor(
        image_processor=images,
        tokenizer=tiny_models.tokenizer_of(raw, begins=True, extra_special_tokens=NAMED),
        num_image_tokens=TOKENS,
        chat_template=tiny_models.CHAT_TEMPLATE,
    )
    return tiny_models.save(model, made, folder, seed)


def deepseek_vl(folder: Path, seed: int = 0) -> PreTrainedModel:
    model, images = DeepseekVLForConditionalGeneration(deepseek_config()), DeepseekVLImageProcessorPil(**SIZES)  # fmt: skip
    return save(model, DeepseekVLProcessor, images, folder, seed)


def janus(folder: Path, seed: int = 0) -> PreTrainedModel:
    model, images = JanusForConditionalGeneration(janus_config()), JanusImageProcessorPil(**SIZES)
    return save(model, JanusProcessor, images, folder, seed)
