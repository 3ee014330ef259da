"""LLaVA and what came of it: a tower's selected layers, projected; tiles packed to one row."""

from typing import Any

import torch
from torch import Tensor

from vtr_export.families import ModelFacts
from vtr_export.frontends.feeds import Feed

CORNERS = 4  # rows that one token is blended of


def projected(model: Any, pixel_values: Tensor) -> Tensor:
    """[images or tiles, tokens, D]: what LLaVA's one tower gives."""
    return seen_by(model, model.model.vision_tower, pixel_values, dropped(model.config))


def dropped(config: Any) -> int:
    """Tokens that come first and are left out."""
    return 1 if config.vision_feature_select_strategy == "default" else 0


def seen_by(model: Any, tower: Any, pixel_values: Tensor, first: int) -> Tensor:
    """[images, tokens, D]: selected layers of a tower side by side, from a token on, projected."""
    layers = model.config.vision_feature_layer
    hidden = tower(pixel_values, output_hidden_states=True).hidden_states
    chosen = [layers] if isinstance(layers, int) else layers
    features = torch.cat([hidden[layer][:, first:] for layer in chosen], dim=-1)
    found: Tensor = model.model.multi_modal_projector(features)
    return found


def packed(model: Any, pixel_values: Tensor, pack_index: Tensor) -> Tensor:
    """[tokens, D]: row 0 is the newline, the others are the tiles' tokens in order."""
    return torch.index_select(_rows(model, pixel_values), 0, pack_index)


def blended(model: Any, pixel_values: Tensor, pack_index: Tensor, pack_weight: Tensor) -> Tensor:
    """[tokens, D]: each the weighted sum of four such rows, in fp32."""
    rows = _rows(model, pixel_values)
    parts = [
        torch.index_select(rows, 0, pack_index[:, corner]).float() * pack_weight[:, corner, None]
        for corner in range(CORNERS)
    ]
    return (parts[0] + parts[1] + parts[2] + parts[3]).to(rows.dtype)


def _rows(model: Any, pixel_values: Tensor) -> Tensor:
    tiles = projected(model, pixel_values)
    return torch.cat((model.model.image_newline[None], tiles.flatten(0, 1)))


def tiles(facts: ModelFacts, dtype: torch.dtype) -> dict[str, Feed]:
    """``pixel_values`` [tiles, channels, H, W], and ``pack_index`` [tokens] int64."""
    vision = facts.vision
    assert vision is not None
    assert vision.image_size is not None, "tiles have one size"
    side = vision.image_size
    pixels = torch.empty(2, vision.channels, side, side, dtype=dtype)
    return {
        "pixel_values": Feed(pixels, ("tiles", None, None, None)),
        "pack_index": Feed(torch.zeros(3, dtype=torch.long), ("tokens",)),
    }


def blended_tiles(facts: ModelFacts, dtype: torch.dtype) -> dict[str, Feed]:
    """Tiles, ``pack_index`` [tokens, 4] int64 and ``pack_weight`` [tokens, 4] fp32."""
    axes = ("tokens", None)
    return {
        **tiles(facts, dtype),
        "pack_index": Feed(torch.zeros(3, CORNERS, dtype=torch.long), axes),
        "pack_weight": Feed(torch.zeros(3, CORNERS), axes),
    }
