"""Idefics2: SigLIP on images of any shape, and the Perceiver that resamples its features."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vtr_export.families import ModelFacts
from vtr_export.frontends.feeds import Feed


def patches(facts: ModelFacts, dtype: torch.dtype) -> dict[str, Feed]:
    """``pixel_values`` [tiles, patches, values]; ``position_ids`` [tiles, patches], -1: a gap."""
    vision = facts.vision
    assert vision is not None
    axes = ("tiles", "patches")
    return {
        "pixel_values": Feed(torch.empty(2, 5, vision.patch_values, dtype=dtype), (*axes, None)),
        "position_ids": Feed(torch.zeros(2, 5, dtype=torch.long), axes),
    }


def resampled(model: Any, pixel_values: Tensor, position_ids: Tensor) -> Tensor:
    """[tiles, latents, D]: each tile's patches see each other, then its latents see them."""
    tower, connector = model.model.vision_model, model.model.connector
    convolution, positions = tower.embeddings.patch_embedding, tower.embeddings.position_embedding
    hidden = functional.linear(pixel_values, convolution.weight.flatten(1), convolution.bias)
    hidden = hidden + positions(position_ids.clamp(min=0))
    real = (position_ids >= 0)[:, None, None, :]
    seen = real.expand(-1, 1, hidden.shape[1], -1)
    hidden = tower.post_layernorm(tower.encoder(hidden, seen).last_hidden_state)
    return perceived(connector.perceiver_resampler, connector.modality_projection(hidden), real)


def perceived(resampler: Any, context: Tensor, real: Tensor) -> Tensor:
    """[tiles, latents, D]: latents see the context and each other."""
    latents = resampler.latents[None].expand(context.shape[0], -1, -1)
    themselves = real.new_ones(1).expand(context.shape[0], 1, 1, latents.shape[1])
    seen = torch.cat((real, themselves), -1).expand(-1, 1, latents.shape[1], -1)
    for layer in resampler.layers:
        latents = layer(latents, context, attention_mask=seen)
    found: Tensor = resampler.norm(latents)
    return found
