"""Facts of VipLLaVA and Video-LLaVA, and what a model in tiles needs of memory."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    LlavaNextConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from vtr_export.families import read_facts
from vtr_export.memory import Workload, get_weight_type, peak_bytes
from vtr_export.schedule import Resolved

KIN = {
    "vipllava": (VipLlavaForConditionalGeneration, VipLlavaConfig()),
    "video_llava": (VideoLlavaForConditionalGeneration, VideoLlavaConfig()),
}


def as_written(config: Any) -> dict[str, Any]:
    return dict(json.loads(config.to_json_string(use_diff=False)))


@pytest.mark.parametrize("name", KIN)
def test_towers_and_projector_are_counted(name: str) -> None:
    kind, config = KIN[name]
    facts = read_facts(as_written(config), "config.json")
    with torch.device("meta"):
        model = kind(config).model
    assert facts.vision is not None
    projector = sum(p.numel() for p in model.multi_modal_projector.parameters())
    assert facts.projector_parameters == projector
    unused = ("post_layernorm", f"layers.{facts.vision.layers_run}.")  # -2 leaves the last one out
    held = sum(
        p.numel()
        for part, p in model.named_parameters()
        if "tower" in part and not any(word in part for word in unused)
    )
    assert facts.vision.parameters == held


def test_vipllava_reads_the_older_name_and_always_drops_the_class_token() -> None:
    config = {"model_type": "vipllava", "vision_feature_layers": [-1, 3]}
    facts = read_facts(config | {"vision_feature_select_strategy": "full"}, "config.json")
    assert facts.tokens_per_image == 576
    assert facts.vision is not None
    assert facts.vision.layers_run == 24
    assert facts.projector_macs == (2 * 1024 + 4096) * 4096


def test_a_vision_encoder_holds_every_tile() -> None:
    facts = read_facts(as_written(LlavaNextConfig()), "config.json")
    assert facts.anyres is not None
    work = Workload(vision_tokens=2880, text_tokens=64)
    resolved = Resolved(facts.layers, None, ())
    several, one = (
        peak_bytes(each, resolved, work, get_weight_type("fp16"), fused=True).vision
        for each in (facts, replace(facts, anyres=None, tokens_per_image=576))
    )
    assert several == 5 * one  # 672 x 672 pixels are four tiles of 336
