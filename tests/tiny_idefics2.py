"""A tiny random Idefics2 with its processor."""

from pathlib import Path
from typing import Any

import tiny_models
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

LATENTS, PATCH, SIDE = 6, 5, 8  # SIDE by SIDE learned positions
EDGES = {"shortest_edge": 17, "longest_edge": 43}
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<fake_token_around_image>", "<end_of_utterance>")  # fmt: skip
CHAT_TEMPLATE = tiny_models.CHAT_TEMPLATE


def tiny_tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    """Whole words."""
    words = [*SPECIAL, *tiny_models.WORDS_LINE.split()]
    words += [f"word{index}" for index in range(len(words), vocab)]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[4:]),
        padding_side="left",
    )


def tiny_config(**perceiver: Any) -> Idefics2Config:
    return Idefics2Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "sliding_window": None,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
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
    return Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil(size=EDGES, do_image_splitting=split),
        tokenizer=tiny_tokenizer(),
        image_seq_len=LATENTS,
        chat_template=CHAT_TEMPLATE,
    )


def idefics2(folder: Path, seed: int = 0, *, split: bool = True) -> PreTrainedModel:
    model = Idefics2ForConditionalGeneration(tiny_config()).eval()
    tiny_models.randomize(model, seed)
    model.save_pretrained(folder)
    tiny_processor(split).save_pretrained(folder)
    return model
