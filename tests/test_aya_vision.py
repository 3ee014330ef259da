"""Aya Vision: tiles, and a decoder whose attention and MLP read one norm."""

import json
from typing import Any

import pytest
import tiny_aya
import torch
from transformers import AyaVisionForConditionalGeneration

from vtr_export.errors import CheckpointError
from vtr_export.families import read_facts
from vtr_export.memory import parameters


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"downsample_factor": 1},
        {"text": {"attention_bias": True}},
        {"alignment_intermediate_size": 24},
        {"tie_word_embeddings": False},
    ],
)
def test_counts_are_those_of_a_real_model(options: dict[str, Any]) -> None:
    config = tiny_aya.tiny_config(**options)
    with torch.device("meta"):
        model = AyaVisionForConditionalGeneration(config)
    facts = read_facts(json.loads(config.to_json_string()), "config.json")
    held = {p: p.numel() for name, p in model.named_parameters() if "post_layernorm" not in name}
    assert parameters(facts).total == sum(held.values())


def test_the_context_ends_where_a_window_begins_to_slide() -> None:
    config = tiny_aya.tiny_config(text={"sliding_window": 512})
    facts = read_facts(json.loads(config.to_json_string()), "config.json")
    assert (facts.window, facts.context) == (512, 512)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"downsample_factor": 3}, "3 does not divide 4 patches"),
        ({"vision_feature_layer": [-1, -2]}, "a tile is no square"),
        ({"vision_feature_select_strategy": "default"}, "a tile is no square"),
    ],
)
def test_refusals(options: dict[str, Any], said: str) -> None:
    config = json.loads(tiny_aya.tiny_config().to_json_string()) | options
    with pytest.raises(CheckpointError, match=said):
        read_facts(config, "config.json")
