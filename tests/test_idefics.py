"""Idefics: what its facts count, who sees which image, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_idefics
import torch
from PIL import Image
from transformers import IdeficsConfig, IdeficsForVisionText2Text
from transformers.models.idefics import processing_idefics as processing

from vtr_export.checkpoint import Checkpoint
from vtr_export.errors import CheckpointError, InputError
from vtr_export.families import read_facts
from vtr_export.memory import parameters
from vtr_export.runtime.crossing import sees
from vtr_export.runtime.images import Seen
from vtr_export.runtime.processor import Processor
from vtr_export.verify.first_layers import truncate
from vtr_export.verify.scope import choose_scope

HUB: dict[str, Any] = {  # of idefics-9b
    "model_type": "idefics",
    "additional_vocab_size": 2,
    "cross_layer_interval": 4,
    "qk_layer_norms": True,
    "use_resampler": True,
    "vision_config": {"embed_dim": 1280},
    "perceiver_config": {"qk_layer_norms_perceiver": True},
}
FAKE, IMAGE, END = tiny_idefics.VOCAB, tiny_idefics.VOCAB + 1, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("idefics")
    tiny_idefics.idefics(folder)
    return folder


@pytest.mark.parametrize(
    "others",
    [
        {},
        HUB,
        {"use_resampler": False, "alpha_type": "vector", "cross_layer_interval": 1},
        {"qk_layer_norms": False, "tie_word_embeddings": True, "additional_vocab_size": 0},
    ],
)
def test_every_parameter_is_counted(others: dict[str, Any]) -> None:
    config = IdeficsConfig(**others) if others is HUB else tiny_idefics.tiny_config(**others)
    facts = read_facts(config.to_dict(), "x")
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(config)
    held = {n: p.numel() for n, p in model.named_parameters() if "post_layernorm" not in n}
    tower = sum(size for name, size in held.items() if "vision_model" in name)
    assert facts.vision is not None
    assert facts.vision.parameters == tower  # without the norm of what pools
    assert parameters(facts).total == sum(held.values())


def test_blocks_are_layers_where_the_hubs_model_has_them() -> None:
    facts = read_facts(HUB, "x")
    assert facts.layers == 40
    assert facts.crosses == (0, 5, 10, 15, 20, 25, 30, 35)
    assert (facts.tokens_per_image, facts.image_token_id) == (64, 32001)
    with pytest.raises(CheckpointError, match="does not divide 32 layers"):
        read_facts({**HUB, "cross_layer_interval": 5}, "x")


@pytest.mark.parametrize(
    "row", [[1, IMAGE, 9], [1, IMAGE, 9, IMAGE, 9], [IMAGE, FAKE, IMAGE, IMAGE, 9, 9]]
)
def test_a_token_sees_the_last_image_before_it(checkpoint: Path, row: list[int]) -> None:
    words = tiny_idefics.tiny_processor().tokenizer
    counted, _ = processing.image_attention_mask_for_packed_input_ids(
        torch.tensor([row]), words, "pt"
    )
    images = row.count(IMAGE)
    expected = processing.incremental_to_binary_attention_mask(counted, "pt", num_classes=images)
    assert (sees(np.array(row) == IMAGE, "latest") == expected[0].numpy()).all()


@pytest.mark.parametrize(
    "parts",
    [
        ["user :", None, "what colour"],
        [None, None, "how many"],
        ["left", None, "right", None, None],
    ],
)
def test_a_prompt_is_written_as_its_processor_writes_parts(
    checkpoint: Path, parts: list[str | None]
) -> None:
    picture = Image.new("RGB", (9, 9))
    theirs = tiny_idefics.tiny_processor()
    expected = theirs(text=[[picture if part is None else part for part in parts]])
    ours = Processor(checkpoint)
    text = " ".join("<image>" if part is None else part for part in parts)
    ids = ours.token_ids(text, [Seen(tiny_idefics.LATENTS)] * parts.count(None))
    assert ids == expected["input_ids"][0].tolist()


def test_an_end_of_text_behind_an_image_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="</s> behind an image"):
        Processor(checkpoint).token_ids("<image> what </s> colour", [Seen(6)])


def test_the_first_layers_end_with_a_group(checkpoint: Path, tmp_path: Path) -> None:
    """Three layers to a block: nothing says a depth of four."""
    whole = Checkpoint.open(checkpoint)
    with pytest.raises(InputError, match="no model has 4 of these layers"):
        truncate(whole, 4, tmp_path)
    assert read_facts(truncate(whole, 6, tmp_path).config, "x").layers == 6
    assert choose_scope(read_facts(whole.config, "x"), 1 << 30) == "layers:3"
