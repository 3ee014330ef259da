"""A tiny random Idefics2 with its processor."""

from pathlib import Path
from typing import Any

import tiny_models
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    PreTrainedModel,
)

LATENTS, PATCH, SIDE = 6, 5, 8  # SIDE by SIDE learned positions
EDGES = {"shortest_edge": 17, "longest_edge": 43}
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<fake_token_around_image>", "<end_of_utterance>")  # fmt: skip


def tiny_config(**perceiver: Any) -> Idefics2Config:
    return Idefics2Config(
        text_config={
            "model_type": "mistral",
            **tiny_models.TEXT,
            "sliding_window": None,
        },
        vision_config={
            **tiny_models.VISION,
            "image_size": PATCH * SIDE,
            "patch_size": PATCH,
        },
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": LATENTS,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 6,
            "num_key_value_heads": 2,
            **perceiver,
        },
        image_token_id=SPECIAL.index("<image>"),
    )


def tiny_processor(split: bool) -> Idefics2Processor:
    raw = tiny_models.whole_words(SPECIAL, apart=SPECIAL)
    return Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil(size=EDGES, do_image_splitting=split),
        tokenizer=tiny_models.tokenizer_of(raw, additional_special_tokens=list(SPECIAL[4:])),
        image_seq_len=LATENTS,
        chat_template=tiny_models.CHAT_TEMPLATE,
    )


def idefics2(folder: Path, seed: int = 0, *, split: bool = True) -> PreTrainedModel:
    model = Idefics2ForConditionalGeneration(tiny_config())
    return tiny_models.save(model, tiny_processor(split), folder, seed)
