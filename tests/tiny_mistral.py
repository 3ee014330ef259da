"""Tiny random checkpoints with Pixtral's tower: Mistral 3, and LLaVA's form of Pixtral."""

from pathlib import Path
from typing import Any

import tiny_models
from transformers import (
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LightOnOcrProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessorPil,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from vtr_export.verify.processors import pixtral_processor

PATCH, EDGE = 5, 64  # pixels
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
CHAT_TEMPLATE = tiny_models.CHAT_TEMPLATE.replace("<image>", "[IMG]")


def tiny_tokenizer(**named: Any) -> PreTrainedTokenizerFast:
    named = named or {"additional_special_tokens": list(SPECIAL[4:])}
    return tiny_models.tokenizer_of(tiny_models.whole_words(SPECIAL), begins=True, **named)


def sizes() -> dict[str, Any]:
    text = {
        "model_type": "mistral",
        **tiny_models.TEXT,
        "intermediate_size": 64,
        "head_dim": 8,
        "sliding_window": None,
    }
    vision = {
        "model_type": "pixtral",
        **tiny_models.VISION,
        "num_hidden_layers": 4,
        "image_size": EDGE,
        "patch_size": PATCH,
    }
    return {"text_config": text, "vision_config": vision, "image_token_index": 4}


def save(model: PreTrainedModel, folder: Path, seed: int, merge: int) -> PreTrainedModel:
    processor = pixtral_processor()(
        image_processor=PixtralImageProcessorPil(
            size={"longest_edge": EDGE}, patch_size={"height": PATCH, "width": PATCH}
        ),
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH,
        spatial_merge_size=merge,
        chat_template=CHAT_TEMPLATE,
    )
    return tiny_models.save(model, processor, folder, seed)


def mistral3(folder: Path, seed: int = 0) -> PreTrainedModel:
    config = Mistral3Config(tie_word_embeddings=False, **sizes())
    return save(Mistral3ForConditionalGeneration(config), folder, seed, merge=2)


def pixtral(folder: Path, seed: int = 0) -> PreTrainedModel:
    """As mistral-community/pixtral-12b is stored."""
    config = LlavaConfig(vision_feature_layer=-1, vision_feature_select_strategy="full", **sizes())
    return save(LlavaForConditionalGeneration(config), folder, seed, merge=1)


def lighton_ocr(folder: Path, seed: int = 0) -> PreTrainedModel:
    parts = sizes()
    parts["text_config"]["model_type"] = "qwen3"
    config = LightOnOcrConfig(
        text_config=parts["text_config"], vision_config=parts["vision_config"], image_token_id=4
    )
    named = {
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
    }
    processor = LightOnOcrProcessor(
        image_processor=PixtralImageProcessorPil(size={"longest_edge": EDGE}, patch_size=2 * PATCH),
        tokenizer=tiny_tokenizer(extra_special_tokens=named),
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=CHAT_TEMPLATE,
    )
    return tiny_models.save(LightOnOcrForConditionalGeneration(config), processor, folder, seed)
