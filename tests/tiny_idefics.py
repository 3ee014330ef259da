"""A tiny random Idefics with its processor."""

from pathlib import Path
from typing import Any

import tiny_models
import torch
from tokenizers import AddedToken
from transformers import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    PreTrainedModel,
)

VOCAB, SIDE, PATCH, LATENTS = 64, 20, 5, 6
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
FAKE, IMAGE = "<fake_token_around_image>", "<image>"  # words of the second table, in this order
CHAT_TEMPLATE = "<s>" + tiny_models.CHAT_TEMPLATE


def tiny_config(**others: Any) -> IdeficsConfig:
    return IdeficsConfig(
        **{
            "vocab_size": VOCAB,
            "additional_vocab_size": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "cross_layer_interval": 2,
            "max_position_embeddings": 1024,
            "qk_layer_norms": True,
            "use_resampler": True,
            "vision_config": {
                "embed_dim": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": SIDE,
                "patch_size": PATCH,
            },
            "perceiver_config": {
                "resampler_n_latents": LATENTS,
                "resampler_depth": 2,
                "resampler_n_heads": 2,
                "resampler_head_dim": 6,
                "qk_layer_norms_perceiver": True,
            },
            **others,
        }
    )


def tiny_processor() -> IdeficsProcessor:
    raw = tiny_models.whole_words(SPECIAL, VOCAB, apart=SPECIAL)
    raw.add_special_tokens([AddedToken(token, special=True) for token in (FAKE, IMAGE)])
    tokenizer = tiny_models.tokenizer_of(raw, additional_special_tokens=[FAKE, IMAGE])
    tokenizer.chat_template = CHAT_TEMPLATE
    images = IdeficsImageProcessorPil(image_size=SIDE)
    return IdeficsProcessor(image_processor=images, tokenizer=tokenizer)


def idefics(folder: Path, seed: int = 0, **others: Any) -> PreTrainedModel:
    model = IdeficsForVisionText2Text(tiny_config(**others))
    tiny_models.randomize(model, seed)
    with torch.no_grad():
        for name, gate in model.named_parameters():
            if ".alpha_" in name:
                gate.fill_(0.7)
    model.eval().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return model
