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
TEXT = {**tiny_models.TEXT, "intermediate_size": 64}
CLIP_SIZES = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
VIDEO_TEMPLATE = tiny_models.CHAT_TEMPLATE.replace(
    "{% else %}", "{% elif part['type'] == 'video' %} <video>{% else %}"
)
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def vision_sizes(**others: Any) -> dict[str, Any]:
    own = {"intermediate_size": 32, "image_size": TILE, "patch_size": PATCH}
    return {**tiny_models.VISION, **own, **others}


def tokenizer_with_video() -> PreTrainedTokenizerFast:
    tokenizer = tiny_models.tiny_tokenizer(VIDEO)
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    return tokenizer


def llava_next(folder: Path, seed: int = 0) -> PreTrainedModel:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(projection_dim=16, **vision_sizes(num_hidden_layers=6)),
        text_config=LlamaConfig(**TEXT),
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
    return tiny_models.save(LlavaNextForConditionalGeneration(config), processor, folder, seed)


def llava_onevision(folder: Path, seed: int = 0) -> PreTrainedModel:
    points = [[rows * TILE, columns * TILE] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(vision_use_head=False, **vision_sizes()),
        text_config=Qwen2Config(**TEXT),
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
    return tiny_models.save(LlavaOnevisionForConditionalGeneration(config), processor, folder, seed)


def vipllava(folder: Path, seed: int = 0) -> PreTrainedModel:
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(projection_dim=16, **vision_sizes()),
        text_config=LlamaConfig(**TEXT),
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
    return tiny_models.save(VipLlavaForConditionalGeneration(config), processor, folder, seed)


def video_llava(folder: Path, seed: int = 0) -> PreTrainedModel:
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(projection_dim=16, **vision_sizes(num_hidden_layers=6)),
        text_config=LlamaConfig(**TEXT),
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
    return tiny_models.save(VideoLlavaForConditionalGeneration(config), processor, folder, seed)
