"""Tiny random DeepSeek-VL and Janus models with their processors."""

from pathlib import Path
from typing import Any

import tiny_models
from tokenizers import Tokenizer, models, pre_tokenizers, processors
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
    PreTrainedTokenizerFast,
)

IMAGE, PATCH = 30, 6
TOKENS = (IMAGE // PATCH) ** 2
NAMED = {"image_token": "<image>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", *NAMED.values())
SIZES = {"size": {"height": IMAGE, "width": IMAGE}, "min_size": 5}


def tiny_tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    """Whole words, ``<s>`` in front."""
    words = [*SPECIAL, *tiny_models.WORDS_LINE.split()]
    words += [f"word{index}" for index in range(len(words), vocab)]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=NAMED,
        padding_side="left",
    )


def text_sizes() -> dict[str, Any]:
    return {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


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
        text_config={"model_type": "llama", **text_sizes()},
        vision_config={
            "model_type": "siglip_vision_model", "intermediate_size": 24,
            "vision_use_head": False, **vision_sizes(),
        },
        image_token_id=SPECIAL.index("<image>"),
        **options,
    )  # fmt: skip


def janus_config(**vision: Any) -> JanusConfig:
    return JanusConfig(
        text_config={"model_type": "llama", **text_sizes()},
        vision_config={"mlp_ratio": 1.5, "projection_dim": 32, **vision_sizes(), **vision},
        vq_config={
            "embed_dim": 8, "num_embeddings": 16, "base_channels": 32, "latent_channels": 32,
            "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_patches": 4,
            "image_token_embed_dim": 32, "projection_dim": 32, "num_hidden_layers": 1,
        },
        image_token_id=SPECIAL.index("<image>"),
    )  # fmt: skip


def save(model: PreTrainedModel, processor: Any, images: Any, folder: Path, seed: int) -> Any:
    tiny_models.randomize(model, seed)
    model.eval().save_pretrained(folder)
    processor(
        image_processor=images,
        tokenizer=tiny_tokenizer(),
        num_image_tokens=TOKENS,
        chat_template=tiny_models.CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return model


def deepseek_vl(folder: Path, seed: int = 0) -> PreTrainedModel:
    model, images = DeepseekVLForConditionalGeneration(deepseek_config()), DeepseekVLImageProcessorPil(**SIZES)  # fmt: skip
    return save(model, DeepseekVLProcessor, images, folder, seed)


def janus(folder: Path, seed: int = 0) -> PreTrainedModel:
    model, images = JanusForConditionalGeneration(janus_config()), JanusImageProcessorPil(**SIZES)
    return save(model, JanusProcessor, images, folder, seed)
