"""What is particular to Idefics3 and SmolVLM: whole tiles, and where a tile's patches stand."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_idefics3 import TILE, idefics3
from transformers import Idefics3ImageProcessorPil, Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from vtr_export.checkpoint import read_model_facts
from vtr_export.errors import ArtifactError
from vtr_export.frontends.families.idefics3 import position_ids
from vtr_export.runtime.images.kinds import parse_kind


@pytest.mark.parametrize("side", [4, 14, 16, 26, 27, 32, 37])
def test_positions_of_a_whole_tile_are_those_of_the_tower(side: int) -> None:
    tower = Idefics3VisionEmbeddings(
        Idefics3VisionConfig(hidden_size=2, image_size=2 * side, patch_size=2)
    )
    asked: list[torch.Tensor] = []
    tower.position_embedding.register_forward_pre_hook(lambda _, args: asked.append(args[0]))
    whole = torch.ones(1, side, side, dtype=torch.bool)
    tower(torch.zeros(1, 3, 2 * side, 2 * side), whole)
    assert asked[0][0].tolist() == position_ids(side)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_image_splitting": False},
        {"do_resize": False},
        {"size": {"longest_edge": 5 * TILE}, "do_normalize": False},
    ],
    ids=["as it is", "whole", "unscaled", "large"],
)
def test_tiles_are_those_of_transformers(changes: dict[str, Any], tmp_path: Any) -> None:
    idefics3(tmp_path)
    facts = read_model_facts(tmp_path)
    settings = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
    theirs = Idefics3ImageProcessorPil(**{**settings, **changes})
    kind = parse_kind(theirs.to_dict(), "processor_config.json")
    random = np.random.default_rng(3)
    for width, height in ((28, 28), (29, 28), (1, 90), (90, 1), (200, 31), (33, 140), (56, 56)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = theirs(images=image, return_tensors="np", return_row_col_info=True)
        inputs = kind.inputs([image], facts)
        for name, values in inputs.given.items():
            assert np.array_equal(values, expected[name]), (name, width, height)
        assert inputs.seen[0].tiles == (expected["rows"][0][0], expected["cols"][0][0])


def test_tiles_of_another_size_than_the_towers_are_refused(tmp_path: Any) -> None:
    idefics3(tmp_path)
    config = {
        "image_processor_type": "Idefics3ImageProcessor",
        "max_image_size": {"longest_edge": 56},
    }
    with pytest.raises(ArtifactError, match="56"):
        parse_kind(config, "x").inputs([], read_model_facts(tmp_path))
