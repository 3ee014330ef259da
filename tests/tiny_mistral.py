"""Tiny random checkpoints with Pixtral's tower: Mistral 3, and LLaVA's form of Pixtral."""

from pathlib import Path
from typing import Any

import tiny_models
from tokenizers import Tokenizer, models, pre_tokenizers, processors
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


def tiny_tokenizer(vocab: int = 64, **named: Any) -> PreTrainedTokenizerFast:
    """Whole words, ``<s>`` in front."""
    words = [*SPECIAL, *tiny_models.WORDS_LINE.split()]
    words += [f"word{index}" for index in range(len(words), vocab)]
    raw = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words[:vocab])}, unk_token="<unk>")
    )
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
        padding_side="left",
        **(named or {"additional_special_tokens": list(SPECIAL[4:])}),
    )


def sizes() -> dict[str, Any]:
    text = {
        "model_type": "mistral",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "sliding_window": None,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": EDGE,
        "patch_size": PATCH,
    }
    return {"text_config": text, "vision_config": vision, "image_token_index": 4}


def save(model: PreTrainedModel, folder: Path, seed: int, merge: int) -> PreTrainedModel:
    tiny_models.randomize(model, seed)
    model.eval().save_pretrained(folder)
    pixtral_processor()(
        image_processor=PixtralImageProcessorPil(
            size={"longest_edge": EDGE}, patch_size={"height": PATCH, "width": PATCH}
        ),
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH,
        spatial_merge_size=merge,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return model


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
    model = LightOnOcrForConditionalGeneration(config).eval()
    tiny_models.randomize(model, seed)
    model.save_pretrained(folder)
    named = {
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
    }
    LightOnOcrProcessor(
        image_processor=PixtralImageProcessorPil(size={"longest_edge": EDGE}, patch_size=2 * PATCH),
        tokenizer=tiny_tokenizer(extra_special_tokens=named),
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return model
