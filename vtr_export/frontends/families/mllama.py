"""Mllama: tiles of an image see each other; some layers attend to them instead of to text."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtr_export.families import ModelFacts
from vtr_export.frontends.feeds import Feed


def tiles(facts: ModelFacts, dtype: torch.dtype) -> dict[str, Feed]:
    """All images cut into as many tiles; which of them are some, and in what grid."""
    vision = facts.vision
    assert vision is not None
    assert vision.image_size is not None
    side, count = vision.image_size, vision.tiles
    images = ("images", *(None,) * 4)
    return {
        "pixel_values": Feed(
            torch.empty(2, count, vision.channels, side, side, dtype=dtype), images
        ),
        "aspect_ratio_ids": Feed(torch.ones(2, dtype=torch.long), ("images",)),
        "aspect_ratio_mask": Feed(torch.ones(2, count, dtype=torch.long), ("images", None)),
    }


def projected(
    model: Any, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor
) -> Tensor:
    """[images, tiles * tokens, D]; of the tiles that are none, too: some rows attend to them."""
    whole = model.model
    seen = whole.vision_model(
        pixel_values=pixel_values[:, None],
        aspect_ratio_ids=aspect_ratio_ids[:, None],
        aspect_ratio_mask=aspect_ratio_mask[:, None],
    ).last_hidden_state
    features: Tensor = whole.multi_modal_projector(seen).flatten(1, 3)
    return features


def decoded(model: Any, asked: Mapping[str, Any], crossing: Any) -> Tensor:
    """Logits of the last position; an MLP behind cross-attention is silent where rows are 0."""
    said = model.model.language_model(
        **asked,
        cross_attention_states=crossing.states,
        cross_attention_mask=crossing.mask,
        full_text_row_masked_out_mask=crossing.rows[:, None],
    )
    logits: Tensor = model.lm_head(said.last_hidden_state[:, -1:])
    return logits
