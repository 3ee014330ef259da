"""Tiny random Idefics3 and SmolVLM models with their processors."""

from pathlib import Path
from typing import Any

import tiny_models
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    Idefics3VisionConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
    SmolVLMVisionConfig,
)

from vtr_export.verify.processors import without_videos

TILE, PATCH, MERGE = 28, 7, 2
TOKENS = (TILE // PATCH // MERGE) ** 2  # of a tile
NAMED = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
    **{f"row_{r}_col_{c}_token": f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)},
}
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", *NAMED.values())
IMAGES = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
TEXT = {**tiny_models.TEXT, "vocab_size": 72, "intermediate_size": 64}
VISION = {**tiny_models.VISION, "image_size": TILE, "patch_size": PATCH}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    raw = tiny_models.whole_words((*SPECIAL, "\n"), TEXT["vocab_size"])
    return tiny_models.tokenizer_of(raw, extra_special_tokens=NAMED)


def idefics3(folder: Path, seed: int = 0) -> PreTrainedModel:
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(**IMAGES),
        tiny_tokenizer(),
        image_seq_len=TOKENS,
        chat_template=tiny_models.CHAT_TEMPLATE,
    )
    vision = Idefics3VisionConfig(**VISION)
    return save(Idefics3ForConditionalGeneration, Idefics3Config, vision, processor, folder, seed)


def smolvlm(folder: Path, seed: int = 0) -> PreTrainedModel:
    processor = without_videos(SmolVLMProcessor)(
        SmolVLMImageProcessorPil(**IMAGES),
        tiny_tokenizer(),
        None,
        image_seq_len=TOKENS,
        chat_template=tiny_models.CHAT_TEMPLATE,
    )
    vision = SmolVLMVisionConfig(**VISION)
    return save(SmolVLMForConditionalGeneration, SmolVLMConfig, vision, processor, folder, seed)


def save(
    kind: Any, config: Any, vision: Any, processor: ProcessorMixin, folder: Path, seed: int
) -> PreTrainedModel:
    """A random model of class ``kind`` and its processor."""
    model: PreTrainedModel = kind(
        config(
            vision_config=vision,
            text_config=LlamaConfig(**TEXT),
            scale_factor=MERGE,
            image_token_id=SPECIAL.index("<image>"),
            attn_implementation="eager",
        )
    )
    return tiny_models.save(model, processor, folder, seed)
