"""Tiles of any resolution: pixels, counts and the order of tokens, against transformers' own."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_llavas
import torch
from PIL import Image
from transformers import (
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from vtr_export.errors import ArtifactError, CheckpointError
from vtr_export.families import Anyres, ModelFacts, read_facts
from vtr_export.runtime.images.anyres import best_resolution
from vtr_export.runtime.images.kinds import parse_kind
from vtr_export.runtime.images.tile_tokens import Tokens, tiled
from vtr_export.runtime.processor import Processor

CONFIGS = {
    "llava_next": LlavaNextConfig(),
    "llava_onevision": LlavaOnevisionConfig(),
}
MODELS = {"llava_next": LlavaNextModel, "llava_onevision": LlavaOnevisionModel}
ODD_SIZES = ((1, 1), (1, 7), (90, 1), (41, 50), (50, 41), (28, 28), (57, 29), (300, 20), (333, 777))
EDGES = (1, 2, 3, 17, 83, 335, 336, 337, 384, 500, 671, 673, 997, 1152, 1999, 4000)


def facts_of(name: str) -> ModelFacts:
    return read_facts(json.loads(CONFIGS[name].to_json_string(use_diff=False)), "config.json")


def counts_as(name: str) -> Any:
    """Transformers' own count of the tokens of an image of (height, width)."""
    config = CONFIGS[name]
    images = SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints)
    if name == "llava_next":
        own = SimpleNamespace(image_processor=images, patch_size=14, num_additional_image_tokens=0)
        kind: Any = LlavaNextProcessor
    else:
        own = SimpleNamespace(
            image_processor=images, num_image_tokens=27**2, vision_aspect_ratio="anyres_max_9"
        )
        kind = LlavaOnevisionProcessor
    own._get_unpadded_features = lambda *sizes: kind._get_unpadded_features(own, *sizes)
    edge = config.vision_config.image_size
    return lambda height, width: kind._get_number_of_features(own, height, width, edge, edge)


def tokens_of(facts: ModelFacts, height: int, width: int) -> Tokens:
    anyres, vision = facts.anyres, facts.vision
    assert isinstance(anyres, Anyres)
    assert vision is not None
    assert vision.image_size is not None
    best = best_resolution((height, width), anyres.pinpoints)
    tiles = best[0] // vision.image_size, best[1] // vision.image_size
    return tiled(anyres, tiles, height, width)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_size_has_as_many_tokens_as_the_processor_writes(name: str) -> None:
    facts, count = facts_of(name), counts_as(name)
    random = np.random.default_rng(0).integers(1, 3000, (200, 2)).tolist()
    for height, width in [*((h, w) for h in EDGES for w in EDGES), *random]:
        assert len(tokens_of(facts, height, width)) == count(height, width), (height, width)


@pytest.mark.parametrize(
    "size", [(1, 1), (333, 777), (1999, 17), (640, 480), (97, 3000), (2000, 2100)]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_that_the_model_packs(name: str, size: tuple[int, int]) -> None:
    facts, config = facts_of(name), CONFIGS[name]
    assert facts.anyres is not None
    best = best_resolution(size, facts.anyres.pinpoints)
    tiles = 1 + best[0] * best[1] // config.vision_config.image_size**2
    count = facts.anyres.side**2
    features = torch.randn(tiles, count, 3, generator=torch.Generator().manual_seed(0))
    newline = torch.tensor([7.0, 8.0, 9.0])
    options = {"vision_feature_select_strategy": "full"} if name == "llava_next" else {}
    (expected,), _ = MODELS[name].pack_image_features(
        SimpleNamespace(config=config), [features], torch.tensor([size]), image_newline=newline,
        **options,
    )  # fmt: skip
    rows = torch.cat((newline[None], features.flatten(0, 1))).numpy()
    tokens = tokens_of(facts, *size)
    ours = (rows[tokens.index] * tokens.weight[..., None]).sum(1)
    assert ours.shape == expected.shape
    if np.all(tokens.weight[:, 0] == 1):
        assert np.array_equal(ours, expected.numpy())
    else:
        assert name == "llava_onevision"
        np.testing.assert_allclose(ours, expected.numpy(), atol=2e-5)


def picture(seed: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def processors(name: str) -> tuple[Any, ModelFacts]:
    """With tiny tiles, a crop and a resize that differ, and the facts of a model that takes them."""
    points = [[28 * rows, 28 * columns] for rows in (1, 2, 3) for columns in (1, 2, 4)]
    if name == "llava_next":
        theirs: Any = LlavaNextImageProcessorPil(
            size={"shortest_edge": 30}, crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=points,
        )  # fmt: skip
    else:
        theirs = LlavaOnevisionImageProcessorPil(
            size={"height": 28, "width": 28}, image_grid_pinpoints=points
        )
    config = json.loads(CONFIGS[name].to_json_string(use_diff=False))
    config["vision_config"] |= {"image_size": 28, "patch_size": 7}
    return theirs, read_facts(config | {"image_grid_pinpoints": points}, "config.json")


def assert_same(ours: Any, theirs: Any) -> None:
    for name, values in ours.items():
        assert values.dtype == theirs[name].dtype
        assert values.shape == theirs[name].shape
        assert values.tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_of_odd_sizes_and_modes_are_the_same_to_the_bit(name: str) -> None:
    theirs, facts = processors(name)
    kind = parse_kind(theirs.to_dict(), "")
    images = [picture(seed, size) for seed, size in enumerate(ODD_SIZES)]
    images += [picture(0, (33, 60), mode) for mode in ("L", "RGBA", "P", "1", "CMYK")]
    for image in images:
        assert_same(kind.inputs([image], facts).given, theirs(image, return_tensors="np"))


@pytest.mark.parametrize("name", CONFIGS)
def test_unlike_images_share_a_call(name: str) -> None:
    theirs, facts = processors(name)
    kind = parse_kind(theirs.to_dict(), "")
    images = [picture(1, (90, 20)), picture(2, (20, 20)), picture(3, (300, 200))]
    together = kind.inputs(images, facts)
    assert_same(together.given, theirs(images, return_tensors="np"))
    alone = [kind.inputs([image], facts) for image in images]
    assert [image.tokens for image in together.seen] == [one.tokens for one in alone]
    pixels = np.concatenate([one.feeds["pixel_values"] for one in alone])
    assert np.array_equal(together.feeds["pixel_values"], pixels)
    shown = kind.view(together, 1)
    assert shown.size == (28, 28)


def test_several_images_of_one_prompt_have_no_tiles_in_onevision() -> None:
    theirs, facts = processors("llava_onevision")
    kind = parse_kind(theirs.to_dict(), "")
    images = [
        picture(seed, size) for seed, size in enumerate(((90, 20), (20, 90), (31, 31), (60, 70)))
    ]
    nested = [[images[0], images[1]], [images[2]], [], [images[3]]]
    ours = kind.of_prompts([2, 1, 0, 1]).inputs(images, facts)  # type: ignore[attr-defined]
    assert_same(ours.given, theirs(nested, return_tensors="np"))
    assert [image.tokens for image in ours.seen[:2]] == [17, 17]
    assert min(image.tokens for image in ours.seen[2:]) > 17


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_grid_pinpoints": [[336, 500]]}, "in tiles of 336 pixels"),
        ({"image_grid_pinpoints": []}, "in tiles of 336 pixels"),
        ({"vision_feature_select_strategy": "full"}, "577 tokens, which are no 24 rows of 24"),
        ({"text_config": {"model_type": "mamba"}}, "mamba"),
    ],
)
def test_models_whose_tiles_do_not_fit_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_facts({"model_type": "llava_next", **change}, "config.json")


def test_an_aspect_ratio_without_a_number_is_refused() -> None:
    with pytest.raises(CheckpointError, match="vision_aspect_ratio is 'anyres'"):
        read_facts({"model_type": "llava_onevision", "vision_aspect_ratio": "anyres"}, "x")


def test_a_processor_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny_llavas.llava_next(tmp_path)
    file = tmp_path / "processor_config.json"
    written = json.loads(file.read_text())
    for change, said in (({"patch_size": 14}, "counts 4 tokens"), ({}, "tiles of 28 pixels at 1")):
        images = {} if change else {"image_grid_pinpoints": [[56, 56]]}
        changed = {**written, **change, "image_processor": {**written["image_processor"], **images}}
        file.write_text(json.dumps(changed))
        with pytest.raises(ArtifactError, match=said):
            Processor(tmp_path).image_inputs([picture(0, (30, 40))])


@pytest.mark.parametrize("name", CONFIGS)
def test_projector_and_newline_are_counted(name: str) -> None:
    config, facts = CONFIGS[name], facts_of(name)
    with torch.device("meta"):
        model = MODELS[name](config)
    held = sum(p.numel() for p in model.multi_modal_projector.parameters())
    assert facts.projector_parameters == held + model.image_newline.numel()
