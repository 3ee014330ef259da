"""A tiny random GOT-OCR 2 with its processor, which writes 256 tokens for every tile."""

from pathlib import Path
from typing import Any

import tiny_models
from transformers import (
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessorPil,
    GotOcr2Processor,
    PreTrainedModel,
)

SIDE = 64  # pixels of a tile, whose patches are pixels: four by four of them are a token
SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>", "<imgpad>", "<img>", "</img>", "<|im_start|>", "<|im_end|>"
)  # fmt: skip


def tiny_config(text: dict[str, Any] | None = None, **vision: Any) -> GotOcr2Config:
    return GotOcr2Config(
        text_config={
            "model_type": "qwen2",
            **tiny_models.TEXT,
            "max_position_embeddings": 4096,
            **(text or {}),
        },
        vision_config={
            "hidden_size": 8,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "output_channels": 4,
            "image_size": SIDE,
            "patch_size": 1,
            "window_size": 6,
            "global_attn_indexes": [],
            "mlp_dim": 12,
            **vision,
        },
        image_token_index=SPECIAL.index("<imgpad>"),
        tie_word_embeddings=False,
    )


def got_ocr2(folder: Path, seed: int = 0) -> PreTrainedModel:
    raw = tiny_models.whole_words(SPECIAL, apart=SPECIAL)
    processor = GotOcr2Processor(
        image_processor=GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer=tiny_models.tokenizer_of(raw, begins=True),
        chat_template=tiny_models.CHAT_TEMPLATE.replace("<image>", "<imgpad>"),
    )
    model = GotOcr2ForConditionalGeneration(tiny_config())
    return tiny_models.save(model, processor, folder, seed)
