"""Tiny random LLaVA models and the checkpoint folders that go with them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

PAD, BOS, EOS, UNKNOWN, IMAGE = range(5)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS_LINE = (
    "user assistant : ? . what colour is the which digit how many are there where left right top "
    "bottom of and red green blue yellow zero one two three four five six seven eight nine yes no"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} :"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
TEXT = {  # of a decoder
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
VISION = {  # of a tower, but for its image and patches
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
SHARPNESS = 1.6  # scale of q and k: scores get a spread of about SHARPNESS^2


def tiny_llava(
    layers: int = 4,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    image: int = 28,
    patch: int = 7,
    vocab: int = 64,
    seed: int = 0,
    *,
    text: Literal["llama", "mistral", "qwen2"] = "llama",
    tower: Literal["clip", "siglip"] = "clip",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    **text_overrides: Any,
) -> LlavaForConditionalGeneration:
    """A LLaVA in eval mode whose attention is sharp; ``(image / patch)^2`` tokens an image.

    ``text_overrides`` go to the text config. Weights are drawn in fp32 and cast to ``dtype``.
    """
    extra = {"mistral": {"sliding_window": None}}.get(text, {})
    text_config = TEXT_CONFIGS[text](
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=tied,
        **(extra | text_overrides),
    )
    config = LlavaConfig(
        vision_config=_vision_config(tower, image, patch),
        text_config=text_config,
        image_token_index=IMAGE,
        image_seq_length=(image // patch) ** 2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        vision_feature_layer=-2 if tower == "clip" else -1,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    model = LlavaForConditionalGeneration(config)
    randomize(model, seed)
    return model.to(dtype).eval()


def _vision_config(tower: str, image: int, patch: int) -> CLIPVisionConfig | SiglipVisionConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image,
        "patch_size": patch,
    }
    if tower == "clip":
        return CLIPVisionConfig(projection_dim=16, **sizes)
    return SiglipVisionConfig(vision_use_head=False, **sizes)


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Draw every weight anew: unit gain in general, sharper q and k, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weight.copy_(1 + 0.1 * noise)
        elif weight.ndim < 2:
            weight.copy_(0.1 * noise)
        elif "embed" in name:
            weight.copy_(noise)
        else:
            gain = SHARPNESS if ".q_proj." in name or ".k_proj." in name else 1.0
            weight.copy_(noise * gain / math.sqrt(weight[0].numel()))


def whole_words(special: Sequence[str], vocab: int = 64, apart: Sequence[str] = ()) -> Tokenizer:
    """The special ones first; unused ids are ``word45``, ``word46``, … ``apart`` need no spaces."""
    words = [*special, *WORDS_LINE.split()]
    words += [f"word{index}" for index in range(len(words), vocab)]
    ids = {word: index for index, word in enumerate(words[:vocab])}
    raw = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens([AddedToken(token, special=True) for token in apart])
    return raw


def tokenizer_of(raw: Tokenizer, *, begins: bool = False, **named: Any) -> PreTrainedTokenizerFast:
    """With LLaMA's special tokens and left padding; ``begins``: ``<s>`` in front of a text."""
    if begins:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        **named,
    )


def tiny_tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    """LLaVA's."""
    named = {"image_token": "<image>"}
    raw = whole_words(SPECIAL, vocab)
    return tokenizer_of(raw, begins=True, extra_special_tokens=named, model_max_length=1024)


def save(model: Any, processor: ProcessorMixin, folder: Path, seed: int) -> PreTrainedModel:
    """A checkpoint folder with weights drawn anew."""
    randomize(model, seed)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return cast("PreTrainedModel", model)


def tiny_processor(model: LlavaForConditionalGeneration) -> LlavaProcessor:
    """The processor that fits ``model``."""
    vision = model.config.vision_config
    size = vision.image_size
    is_clip = vision.model_type == "clip_vision_model"
    if is_clip:
        images = CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
    else:
        images = SiglipImageProcessorPil(size={"height": size, "width": size})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tiny_tokenizer(model.config.text_config.vocab_size),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1 if is_clip else 0,
        chat_template=CHAT_TEMPLATE,
    )


def save_checkpoint(
    model: LlavaForConditionalGeneration, folder: Path | str, shards: int = 1
) -> Path:
    """Write weights in about ``shards`` safetensors files (at least two when > 1), configs, tokenizer."""
    folder = Path(folder)
    size_bytes = sum(weight.nbytes for weight in model.state_dict().values())
    limit = size_bytes + 1 if shards == 1 else size_bytes // shards + 1
    model.save_pretrained(folder, max_shard_size=limit)
    tiny_processor(model).save_pretrained(folder)
    return folder


def prompt(generator: torch.Generator, tokens: int, images: int) -> list[int]:
    """Random words with ``images`` runs of image tokens between them; the last is a word."""
    words = torch.randint(UNKNOWN + 2, 45, (images + 1, 4), generator=generator).tolist()
    lengths = torch.randint(1, 5, (images + 1,), generator=generator).tolist()
    row: list[int] = []
    for length, part in zip(lengths, words, strict=True):
        row += [IMAGE] * tokens * bool(row) + part[:length]
    return row


def pictures(
    model: LlavaForConditionalGeneration, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Noise as the model takes it: ``pixel_values`` of ``count`` images."""
    size = model.config.vision_config.image_size
    return torch.randn(count, 3, size, size, generator=generator).to(model.dtype)
