"""Qwen's vision-language models: what is theirs alone."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vtr_export.families import read_facts
from vtr_export.memory import parameters

# config.json of Qwen2.5-VL-3B-Instruct and Qwen2-VL-2B-Instruct, as published, with fewer layers
FLAT: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "vision_config": {
            "depth": 2, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
            "num_heads": 16, "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14,
            "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 128000,
        "max_window_layers": 70, "num_attention_heads": 16, "num_hidden_layers": 3,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "qwen2_vl": {
        "vision_config": {
            "depth": 2, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
            "hidden_size": 1536, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "temporal_patch_size": 2,
        },
        "hidden_size": 1536, "intermediate_size": 8960, "max_position_embeddings": 32768,
        "max_window_layers": 28, "num_attention_heads": 12, "num_hidden_layers": 3,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
}  # fmt: skip
TOP: dict[str, Any] = {
    "image_token_id": 151655, "vision_start_token_id": 151652, "sliding_window": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1000000.0,
}  # fmt: skip


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("named", [True, False])
def test_a_file_of_the_hub_has_the_decoder_at_the_top(kind: str, named: bool) -> None:
    config = {"model_type": kind, **TOP, **FLAT[kind]}
    if named:  # as transformers 4 wrote it
        config["vision_config"] = {**config["vision_config"], "model_type": kind}
    facts = read_facts(config, "config.json")
    own = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(own)
    assert facts.tied
    assert facts.context == config["max_position_embeddings"]
    assert parameters(facts).total == sum(weight.numel() for weight in model.parameters())
