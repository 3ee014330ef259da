"""Tiny random Qwen vision-language models and the checkpoint folders that go with them."""

from pathlib import Path
from typing import Any

import tiny_models
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)

from vtr_export.verify.processors import without_videos

VOCAB, HEADS, HEAD_DIM = 64, 4, 16
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
IDS = {
    "image_token_id": SPECIAL.index("<|image_pad|>"),
    "video_token_id": SPECIAL.index("<|video_pad|>"),
    "vision_start_token_id": SPECIAL.index("<|vision_start|>"),
    "vision_end_token_id": SPECIAL.index("<|vision_end|>"),
}

VISION_3 = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": HEADS * HEAD_DIM,
    "patch_size": 4,
    "num_position_embeddings": 49,
    "deepstack_visual_indexes": [0, 1, 3],
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; nothing is put in front."""
    raw = tiny_models.whole_words((*SPECIAL, "<unk>"), VOCAB, apart=SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL[1:]),
        padding_side="left",
        model_max_length=4096,
    )


def text_config(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        "bos_token_id": 0,
        "eos_token_id": SPECIAL.index("<|im_end|>"),
        "pad_token_id": 0,
        **more,
    }


def save(
    model: PreTrainedModel, processor: Any, folder: Path, seed: int, patch: int = 4
) -> PreTrainedModel:
    """Small patches, so that a picture is a few hundred tokens at most."""
    images = Qwen2VLImageProcessorPil(
        patch_size=patch, size={"shortest_edge": 16 * patch**2, "longest_edge": 300 * patch**2}
    )
    made = without_videos(processor)(
        image_processor=images, tokenizer=tokenizer(), chat_template=CHAT_TEMPLATE
    )
    return tiny_models.save(model, made, folder, seed)


def qwen2_5_vl(folder: Path, seed: int = 0) -> PreTrainedModel:
    config = Qwen2_5_VLConfig(
        text_config=text_config(),
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "out_hidden_size": HEADS * HEAD_DIM,
            "patch_size": 4,
            "window_size": 24,
            "fullatt_block_indexes": [1, 3],
        },
        **IDS,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    return save(model, Qwen2_5_VLProcessor, folder, seed)


def qwen2_vl(folder: Path, seed: int = 0) -> PreTrainedModel:
    config = Qwen2VLConfig(
        text_config=text_config(),
        vision_config={
            "depth": 3,
            "embed_dim": 32,
            "hidden_size": HEADS * HEAD_DIM,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 4,
        },
        **IDS,
    )
    model = Qwen2VLForConditionalGeneration(config)
    return save(model, Qwen2VLProcessor, folder, seed)


def text_3(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return text_config(num_hidden_layers=5, head_dim=HEAD_DIM, rope_parameters=rope, **more)


def qwen3_vl(folder: Path, seed: int = 0) -> PreTrainedModel:
    config = Qwen3VLConfig(text_config=text_3(), vision_config=VISION_3, **IDS)
    model = Qwen3VLForConditionalGeneration(config)
    return save(model, Qwen3VLProcessor, folder, seed)


def qwen3_vl_moe(folder: Path, seed: int = 0) -> PreTrainedModel:
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Qwen3VLMoeConfig(text_config=text_3(**experts), vision_config=VISION_3, **IDS)
    model = Qwen3VLMoeForConditionalGeneration(config)
    save(model, Qwen3VLProcessor, folder, seed)
    turn_experts(folder / "model.safetensors")
    return model


def turn_experts(file: Path) -> None:
    """As the hub's files have them: [experts, in, out]."""
    tensors = load_file(file)
    turned = {name: x.mT.contiguous() for name, x in tensors.items() if ".experts." in name}
    save_file({**tensors, **turned}, file, {"format": "pt"})
