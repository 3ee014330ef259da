"""Tiny models of every architecture: they run, they see the image, and their page tells the truth."""

from importlib import import_module as load
from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

PAGE = Path(__file__).parents[1] / "samples" / "bench" / "zoo.md"
BLIND = ("no image", "block diffusion")


def test_the_page_has_every_architecture() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    assert [row.split(" | ")[0][2:] for row in rows[2:]] == [
        *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    ]


@pytest.mark.parametrize("architecture", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
def test_an_architecture(bench: None, architecture: str) -> None:
    zoo, facts, inputs = load("zoo"), load("zoo_facts"), load("zoo_inputs").inputs
    try:
        model = zoo.tiny(architecture)
    except ImportError as error:
        if "timm" not in str(error):
            raise
        pytest.skip("its tower is timm's, which is not installed")
    given = inputs(model)
    found = facts.observe(model, architecture, given)
    assert f"| {' | '.join(zoo._row(found))} |\n" in PAGE.read_text(encoding="utf-8")
    assert sum(weight.numel() for weight in model.parameters()) < 7e5
    with torch.no_grad():
        logits = model(**given).logits
        for name in {"pixel_values", "flattened_patches"} & given.keys():
            generator = torch.Generator().manual_seed(9)
            other = torch.rand(given[name].shape, generator=generator)
            changed = model(**given | {name: other}).logits
            assert not torch.allclose(changed, logits)
    assert not logits.isnan().any()


def test_the_same_seed_gives_the_same_model(bench: None) -> None:
    tiny = load("zoo").tiny
    one, two, other = tiny("llava"), tiny("llava"), tiny("llava", seed=1)
    pairs = list(zip(one.parameters(), two.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(first, second) for first, second, _ in pairs)
    assert not any(torch.equal(first, third) for first, _, third in pairs)
