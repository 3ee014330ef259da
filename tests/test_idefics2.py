"""Idefics2: images of any shape, whole or in quarters, resampled to a few latents."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_idefics2
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Idefics2ForConditionalGeneration

from vtr_export.errors import ArtifactError, InputError
from vtr_export.families import ModelFacts, read_facts
from vtr_export.frontends.families.idefics2 import resampled
from vtr_export.memory import parameters
from vtr_export.runtime.processor import Processor
from vtr_export.verify.processors import load_image_processor, load_processor

SIZES = ((41, 50), (12, 130), (90, 7), (18, 19))


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in SIZES]


def facts_of(config: Any) -> ModelFacts:
    return read_facts(json.loads(config.to_json_string()), "config.json")


@pytest.mark.parametrize("perceiver", [{}, {"resampler_depth": 3, "num_key_value_heads": 4}])
def test_counts_are_those_of_a_real_model(perceiver: dict[str, Any]) -> None:
    config = tiny_idefics2.tiny_config(**perceiver)
    with torch.device("meta"):
        model = Idefics2ForConditionalGeneration(config)
    assert parameters(facts_of(config)).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("split", [False, True])
def test_features_of_unlike_images_are_transformers_own(tmp_path: Path, split: bool) -> None:
    model = tiny_idefics2.idefics2(tmp_path, split=split)
    inputs = Processor(tmp_path).image_inputs(pictures())
    given = load_image_processor(tmp_path)(images=pictures(), return_tensors="np")
    for name, values in given.items():
        assert np.array_equal(inputs.given[name], values), name
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        tensors = {name: torch.from_numpy(values) for name, values in given.items()}
        expected = torch.cat(list(theirs.get_image_features(**tensors).pooler_output))
        feeds = {name: torch.from_numpy(values) for name, values in inputs.feeds.items()}
        model.set_attn_implementation("sdpa")  # takes masks of booleans
        found = resampled(model, **feeds).flatten(0, 1)
    assert len(found) == inputs.tokens
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "prompt",
    ["<image><image> what is the digit", "what <image>colour <image> ?", "<image>\n<image>.yes"],
)
def test_what_is_written_around_images(tmp_path: Path, split: bool, prompt: str) -> None:
    tiny_idefics2.idefics2(tmp_path, split=split)
    processor, two = Processor(tmp_path), pictures()[:2]
    seen = processor.image_inputs(two).seen
    expected = load_processor(tmp_path, backend="pil")(text=prompt, images=two)["input_ids"]
    assert processor.token_ids(prompt, seen) == list(expected[0])


def test_a_split_image_is_shown_whole(tmp_path: Path) -> None:
    tiny_idefics2.idefics2(tmp_path)
    images = Processor(tmp_path).images
    inputs = images.inputs(pictures(), facts_of(tiny_idefics2.tiny_config()))
    assert images.view(inputs, 3).size == (19, 18)
    assert np.array_equal(np.asarray(images.view(inputs, 3)), np.asarray(pictures()[3]))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"do_pad": False}, ArtifactError, "do_pad is false"),
        ({"size": {"longest_edge": 40}}, ArtifactError, "make no sense"),
        ({}, InputError, "cannot be cut into quarters"),
    ],
)
def test_refusals(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    tiny_idefics2.idefics2(tmp_path)
    file = tmp_path / "processor_config.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"image_processor": whole["image_processor"] | changes}))
    with pytest.raises(error, match=said):
        Processor(tmp_path).image_inputs([Image.new("RGB", (30, 1))])
