"""Tiny random checkpoints of what came of LLaVA."""

from pathlib import Path
from typing import Any

import tiny_models
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from vtr_export.verify.processors import without_videos

TILE, PATCH = 28, 7  # pixels
VIDEO = 63  # the token
CLIP_SIZES = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
VIDEO_TEMPLATE = tiny_models.CHAT_TEMPLATE.replace(
    "{% else %}", "{% elif part['type'] == 'video' %} <video>{% else %}"
)
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def text_sizes(**others: Any) -> dict[str, Any]:
    return {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": tiny_models.PAD,
        "bos_token_id": tiny_models.BOS,
        "eos_token_id": tiny_models.EOS,
        **others,
    }


def vision_sizes(**others: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": PATCH,
        **others,
    }


def tokenizer_with_video() -> PreTrainedTokenizerFast:
    tokenizer = tiny_models.tiny_tokenizer(VIDEO)
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    return tokenizer


def save(
    model: PreTrainedModel, processor: ProcessorMixin, folder: Path, seed: int
) -> PreTrainedModel:
    tiny_models.randomize(model, seed)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def llava_next(folder: Path, seed: int = 0) -> PreTrainedModel:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(projection_dim=16, **vision_sizes(num_hidden_layers=6)),
        text_config=LlamaConfig(**text_sizes()),
        image_token_index=tiny_models.IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(**CLIP_SIZES, image_grid_pinpoints=PINPOINTS),
        tokenizer=tiny_models.tiny_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny_models.CHAT_TEMPLATE,
    )
    return save(LlavaNextForConditionalGeneration(config), processor, folder, seed)


def llava_onevision(folder: Path, seed: int = 0) -> PreTrainedModel:
    points = [[rows * TILE, columns * TILE] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(vision_use_head=False, **vision_sizes()),
        text_config=Qwen2Config(**text_sizes()),
        image_token_index=tiny_models.IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=points,
        vision_aspect_ratio="anyres_max_3",
    )
    processor = without_videos(LlavaOnevisionProcessor)(
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": TILE, "width": TILE}, image_grid_pinpoints=points
        ),
        tokenizer=tokenizer_with_video(),
        num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_3",
        chat_template=VIDEO_TEMPLATE,
    )
    return save(LlavaOnevisionForConditionalGeneration(config), processor, folder, seed)


def vipllava(folder: Path, seed: int = 0) -> PreTrainedModel:
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(projection_dim=16, **vision_sizes()),
        text_config=LlamaConfig(**text_sizes()),
        image_token_index=tiny_models.IMAGE,
        image_seq_length=(TILE // PATCH) ** 2,
        vision_feature_layer=[-2, -3, 1],
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**CLIP_SIZES),
        tokenizer=tiny_models.tiny_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny_models.CHAT_TEMPLATE,
    )
    return save(VipLlavaForConditionalGeneration(config), processor, folder, seed)


def video_llava(folder: Path, seed: int = 0) -> PreTrainedModel:
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(projection_dim=16, **vision_sizes(num_hidden_layers=6)),
        text_config=LlamaConfig(**text_sizes()),
        image_token_index=tiny_models.IMAGE,
        video_token_index=VIDEO,
        image_seq_length=(TILE // PATCH) ** 2,
    )
    processor = without_videos(VideoLlavaProcessor)(
        image_processor=VideoLlavaImageProcessor(**CLIP_SIZES),
        tokenizer=tokenizer_with_video(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VIDEO_TEMPLATE,
    )
    return save(VideoLlavaForConditionalGeneration(config), processor, folder, seed)
