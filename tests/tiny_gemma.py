"""Tiny random Gemma 3 and PaliGemma models, with their processors."""

from pathlib import Path
from typing import Any

import tiny_models
from tokenizers import Regex, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

IMAGE, PATCH, VOCAB, WINDOW = 28, 7, 64, 256
NAMED = {
    "boi_token": "<start_of_image>",
    "image_token": "<image>",
    "eoi_token": "<end_of_image>",
}
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", *NAMED.values(), "\n", "\n\n")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }} :"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant :\n{% endif %}"
)
TEXT = {**tiny_models.TEXT, "head_dim": 16, "eos_token_id": 1, "bos_token_id": 2}
CAPPED = {"query_pre_attn_scalar": 9, "sliding_window": WINDOW}
VISION = {
    "model_type": "siglip_vision_model",
    **tiny_models.VISION,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "vision_use_head": False,
}


def tokenizer(**named: str) -> PreTrainedTokenizerFast:
    """Whole words, and ends of lines."""
    raw = tiny_models.whole_words(SPECIAL, VOCAB)
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|[^\s]+"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=named,
        padding_side="left",
    )


def gemma3(folder: Path, seed: int = 0, **text: Any) -> PreTrainedModel:
    """Sixteen patches become four tokens; of the four layers two slide."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3Config(
        text_config={**TEXT, **CAPPED, "layer_types": kinds, **text},
        vision_config=VISION,
        mm_tokens_per_image=4,
        boi_token_index=SPECIAL.index(NAMED["boi_token"]),
        image_token_index=SPECIAL.index(NAMED["image_token"]),
        eoi_token_index=SPECIAL.index(NAMED["eoi_token"]),
    )
    model = Gemma3ForConditionalGeneration(config)
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": IMAGE, "width": IMAGE}),
        tokenizer(**NAMED),
        chat_template=CHAT_TEMPLATE,
        image_seq_length=4,
    )
    return _saved(model, processor, folder, seed)


def paligemma(folder: Path, seed: int = 0) -> PreTrainedModel:
    """On a Gemma decoder."""
    return _paligemma(GemmaConfig(**TEXT), folder, seed)


def paligemma2(folder: Path, seed: int = 0, **text: Any) -> PreTrainedModel:
    """On a Gemma 2 decoder: windows, norms on both sides, capped logits and attention."""
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
    return _paligemma(Gemma2Config(**{**TEXT, **CAPPED, **caps, **text}), folder, seed)


def _paligemma(text: Any, folder: Path, seed: int) -> PreTrainedModel:
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=VISION,
        image_token_index=SPECIAL.index(NAMED["image_token"]),
        projection_dim=text.hidden_size,
        hidden_size=text.hidden_size,
    )
    images = SiglipImageProcessorPil(size={"height": IMAGE, "width": IMAGE})
    images.image_seq_length = (IMAGE // PATCH) ** 2
    named = {"image_token": NAMED["image_token"]}
    model = PaliGemmaForConditionalGeneration(config)
    return _saved(model, PaliGemmaProcessor(images, tokenizer(**named)), folder, seed)


def _saved(model: Any, processor: Any, folder: Path, seed: int) -> PreTrainedModel:
    model.generation_config.eos_token_id = 1
    return tiny_models.save(model, processor, folder, seed)
