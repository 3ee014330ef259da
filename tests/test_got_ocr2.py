"""GOT-OCR 2: what its SAM and its projector hold."""

import json
from typing import Any

import pytest
import tiny_got
import torch
from transformers import GotOcr2ForConditionalGeneration

from vtr_export.errors import CheckpointError
from vtr_export.families import read_facts
from vtr_export.memory import parameters


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_attn_indexes": [1]},
        {"qkv_bias": False},
        {"use_rel_pos": False},
        {"use_abs_pos": False},
    ],
)
def test_counts_are_those_of_a_real_model(options: dict[str, Any]) -> None:
    config = tiny_got.tiny_config(**options)
    with torch.device("meta"):
        model = GotOcr2ForConditionalGeneration(config)
    facts = read_facts(json.loads(config.to_json_string()), "config.json")
    assert parameters(facts).total == sum(p.numel() for p in model.parameters())


def test_patches_that_are_not_whole_fours_are_refused() -> None:
    config = json.loads(tiny_got.tiny_config(image_size=62).to_json_string())
    with pytest.raises(CheckpointError, match="62 patches a side"):
        read_facts(config, "config.json")
