"""A tiny random Aya Vision with its processor."""

from pathlib import Path
from typing import Any

import tiny_models
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    GotOcr2ImageProcessorPil,
    PreTrainedModel,
)

TILE, PATCH, MERGE = 28, 7, 2
SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>",
    "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL", "TILE_1", "TILE_2", "TILE_3",
)  # fmt: skip


def tiny_config(text: dict[str, Any] | None = None, **options: Any) -> AyaVisionConfig:
    return AyaVisionConfig(
        text_config={
            "model_type": "cohere2",
            **tiny_models.TEXT,
            "sliding_window": 1024,
            **(text or {}),
        },
        vision_config={
            "model_type": "siglip_vision_model",
            **tiny_models.VISION,
            "num_hidden_layers": 4,
            "image_size": TILE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        image_token_index=SPECIAL.index("<|IMG_PATCH|>"),
        **{"downsample_factor": MERGE, **options},
    )


def aya_vision(folder: Path, seed: int = 0) -> PreTrainedModel:
    raw = tiny_models.whole_words(SPECIAL, apart=SPECIAL)
    processor = AyaVisionProcessor(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": TILE, "width": TILE}, max_patches=6
        ),
        tokenizer=tiny_models.tokenizer_of(raw, begins=True),
        patch_size=PATCH,
        img_size=TILE,
        downsample_factor=MERGE,
        chat_template=tiny_models.CHAT_TEMPLATE,
    )
    return tiny_models.save(
        AyaVisionForConditionalGeneration(tiny_config()), processor, folder, seed
    )
