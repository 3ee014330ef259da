"""Tiny random Idefics3 and SmolVLM models with their processors."""

from pathlib import Path
from typing import Any

import tiny_models
from tokenizers import Tokenizer, models, pre_tokenizers
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
SIZES = {"vocab_size": 72, "hidden_size": 32, "intermediate_size": 64}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": PATCH,
}


def text_config() -> LlamaConfig:
    return LlamaConfig(
        **SIZES,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, ``<s>`` in front."""
    words = [*SPECIAL, "\n", *tiny_models.WORDS_LINE.split()][: SIZES["vocab_size"]]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=NAMED,
        padding_side="left",
    )


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
            text_config=text_config(),
            scale_factor=MERGE,
            image_token_id=SPECIAL.index("<image>"),
            attn_implementation="eager",
        )
    )
    tiny_models.randomize(model, seed)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model
