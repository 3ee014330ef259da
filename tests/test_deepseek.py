"""DeepSeek-VL and Janus: images fitted into a square, all of a tower's layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_deepseek
import torch
from PIL import Image
from transformers import DeepseekVLForConditionalGeneration, JanusForConditionalGeneration

from vtr_export.errors import ArtifactError, CheckpointError
from vtr_export.families import read_facts
from vtr_export.memory import parameters
from vtr_export.runtime.processor import Processor

DRAWING = ("vqmodel", "generation_")  # of Janus, not exported


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (tiny_deepseek.deepseek_config(), DeepseekVLForConditionalGeneration),
        (
            tiny_deepseek.deepseek_config(tie_word_embeddings=False),
            DeepseekVLForConditionalGeneration,
        ),
        (tiny_deepseek.janus_config(), JanusForConditionalGeneration),
        (
            tiny_deepseek.janus_config(use_qk_norm=True, attention_bias=False, depth=3),
            JanusForConditionalGeneration,
        ),
    ],
)
def test_counts_are_those_of_a_real_model(config: Any, model: Any) -> None:
    with torch.device("meta"):
        named = list(model(config).named_parameters())
    held = [p.numel() for name, p in named if not any(part in name for part in DRAWING)]
    facts = read_facts(json.loads(config.to_json_string()), "config.json")
    assert parameters(facts).total == sum(held)
    assert facts.tokens_per_image == tiny_deepseek.TOKENS


def test_a_projector_of_another_width_is_refused() -> None:
    config = tiny_deepseek.janus_config(projection_dim=48)
    with pytest.raises(CheckpointError, match="projection_dim 48 is not the decoder's width 32"):
        read_facts(json.loads(config.to_json_string()), "config.json")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"use_default_system_prompt": True}, "system prompt before every text"),
        ({"num_image_tokens": 9}, "9 tokens for an image, the model 25"),
        ({"image_processor": {"do_pad": False}}, "a square of one size"),
        ({"image_processor": {"do_resize": False}}, "a square of one size"),
    ],
)
def test_refusals(tmp_path: Path, part: dict[str, Any], said: str) -> None:
    tiny_deepseek.janus(tmp_path)
    file = tmp_path / "processor_config.json"
    whole = json.loads(file.read_text())
    images = whole["image_processor"] | part.get("image_processor", {})
    file.write_text(json.dumps(whole | part | {"image_processor": images}))
    with pytest.raises(ArtifactError, match=said):
        ask(Processor(tmp_path))


def ask(processor: Processor) -> list[int]:
    seen = processor.image_inputs([Image.new("RGB", (30, 7))]).seen
    return processor.token_ids("<image> what", seen)
