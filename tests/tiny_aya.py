"""A tiny random Aya Vision with its processor."""

from pathlib import Path
from typing import Any

import tiny_models
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    GotOcr2ImageProcessorPil,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TILE, PATCH, MERGE = 28, 7, 2
SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>",
    "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL", "TILE_1", "TILE_2", "TILE_3",
)  # fmt: skip


def tiny_tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    """Whole words, ``<s>`` in front."""
    words = [*SPECIAL, *tiny_models.WORDS_LINE.split()]
    words += [f"word{index}" for index in range(len(words), vocab)]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def tiny_config(text: dict[str, Any] | None = None, **options: Any) -> AyaVisionConfig:
    return AyaVisionConfig(
        text_config={
            "model_type": "cohere2",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "sliding_window": 1024,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **(text or {}),
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        image_token_index=SPECIAL.index("<|IMG_PATCH|>"),
        **{"downsample_factor": MERGE, **options},
    )


def aya_vision(folder: Path, seed: int = 0) -> PreTrainedModel:
    model = AyaVisionForConditionalGeneration(tiny_config()).eval()
    tiny_models.randomize(model, seed)
    model.save_pretrained(folder)
    AyaVisionProcessor(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": TILE, "width": TILE}, max_patches=6
        ),
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH,
        img_size=TILE,
        downsample_factor=MERGE,
        chat_template=tiny_models.CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return model
