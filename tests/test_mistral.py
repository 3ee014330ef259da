"""Mistral 3 and Pixtral: images that keep their shape, in rows with breaks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_mistral
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

from vtr_export.errors import ArtifactError, CheckpointError, InputError
from vtr_export.families import ModelFacts, read_facts
from vtr_export.frontends.families.pixtral import merged
from vtr_export.memory import parameters
from vtr_export.runtime.images import read_kind

PUBLISHED = {  # preprocessor_config.json of mistralai/Mistral-Small-3.1-24B-Instruct-2503
    "image_processor_type": "PixtralImageProcessor",
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "patch_size": 14,
    "processor_class": "PixtralProcessor",
    "resample": 3,
    "size": {"longest_edge": 1540},
}


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]


def facts_of(config: Any) -> ModelFacts:
    return read_facts(json.loads(config.to_json_string()), "config.json")


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"multimodal_projector_bias": True}])
def test_counts_are_those_of_a_real_mistral_3(merge: int, options: dict[str, Any]) -> None:
    config = Mistral3Config(
        spatial_merge_size=merge, tie_word_embeddings=False, **options, **tiny_mistral.sizes()
    )
    with torch.device("meta"):
        model = Mistral3ForConditionalGeneration(config)
    assert parameters(facts_of(config)).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("merge", [1, 3])
def test_counts_are_those_of_a_real_lighton_ocr(merge: int) -> None:
    parts = tiny_mistral.sizes()
    config = LightOnOcrConfig(
        text_config=parts["text_config"] | {"model_type": "qwen3"},
        vision_config=parts["vision_config"],
        spatial_merge_size=merge,
    )
    with torch.device("meta"):
        model = LightOnOcrForConditionalGeneration(config)
    assert parameters(facts_of(config)).total == sum(p.numel() for p in model.parameters())


def test_what_config_json_leaves_out_is_transformers_default() -> None:
    facts, config = read_facts({"model_type": "mistral3"}, "config.json"), Mistral3Config()
    with torch.device("meta"):
        model = Mistral3ForConditionalGeneration(config)
    assert facts.tied
    assert parameters(facts).total == sum(p.numel() for p in set(model.parameters()))


@pytest.mark.parametrize(
    ("family", "layers"), [("mistral3", -2), ("mistral3", 3), ("llava", -1), ("llava", [1, -2])]
)
def test_features_of_unlike_images_are_transformers_own(
    tmp_path: Path, family: str, layers: Any
) -> None:
    options = {"vision_feature_layer": layers, **tiny_mistral.sizes()}
    if family == "mistral3":
        config = Mistral3Config(tie_word_embeddings=False, **options)
        model = Mistral3ForConditionalGeneration(config)
        tiny_mistral.save(model, tmp_path, 0, merge=2)
    else:
        config = LlavaConfig(vision_feature_select_strategy="full", **options)
        model = LlavaForConditionalGeneration(config)
        tiny_mistral.save(model, tmp_path, 0, merge=1)
    given = read_kind(tmp_path).inputs(pictures((41, 50), (12, 130), (5, 5)), facts_of(config))
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        tensors = {name: torch.from_numpy(values) for name, values in given.given.items()}
        expected = torch.cat(list(theirs.get_image_features(**tensors).pooler_output))
        feeds = {name: torch.from_numpy(values) for name, values in given.feeds.items()}
        found = merged(model, **feeds)
    assert len(found) == given.tokens
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_published_processor_asks_for_merged_patches(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    whole = {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2}
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    facts = read_facts({"model_type": "mistral3"}, "config.json")
    (image,) = read_kind(tmp_path).inputs(pictures((600, 1700)), facts).seen
    assert image.grid == (1, 20, 55)  # 543 x 1540 pixels, up to whole blocks of 28


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"patch_size": 3}, ArtifactError, "blocks of 6 pixels, the model takes 28"),
        ({"do_resize": False}, InputError, "no whole patches"),
    ],
)
def test_processors_that_do_not_fit(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED | changes))
    whole = {"patch_size": 14, "spatial_merge_size": 2} | changes
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    facts = read_facts({"model_type": "mistral3"}, "config.json")
    with pytest.raises(error, match=said):
        read_kind(tmp_path).inputs(pictures((30, 30)), facts)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mistral3", "vision_feature_layer": [-1, -2]}, "selects 2 layers"),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "drops a patch"),
    ],
)
def test_configurations_that_transformers_cannot_run(config: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_facts(config, "config.json")
