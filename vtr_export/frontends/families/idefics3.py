"""Idefics3 and SmolVLM: tiles that fill the tower's square, whose positions are constants."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def features(model: Any, pixel_values: Tensor) -> Tensor:
    """[tiles, tokens, D] of tiles without padding."""
    inner = model.model
    tower, embeddings = inner.vision_model, inner.vision_model.embeddings
    hidden = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    places = torch.tensor(position_ids(embeddings.num_patches_per_side))
    hidden = hidden + embeddings.position_embedding(places)
    hidden = tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
    found: Tensor = inner.connector(tower.post_layernorm(hidden))
    return found


def position_ids(side: int) -> list[int]:
    """Of a whole tile's patches, row by row, rounded as the tower's code rounds them."""
    share = np.float32(1) / np.float32(side)
    places = np.minimum(np.arange(side, dtype=np.float32) * share, np.float32(1 - 1e-6))
    boundaries = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)
    buckets = np.searchsorted(boundaries, places, side="right")
    return [int(row * side + column) for row in buckets for column in buckets]
