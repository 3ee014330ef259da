"""From token ids and images to what the decoder takes, batches included."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pad_batch(
    rows: Sequence[Sequence[int]], pad_id: int, image_token_id: int
) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``attention_mask`` ``[B, S]``, left-padded to max(text) + max(vision)."""
    vision = [sum(token == image_token_id for token in row) for row in rows]
    text = [len(row) - count for row, count in zip(rows, vision, strict=True)]
    length = max(text) + max(vision)
    ids = [[pad_id] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def vision_index_of(is_vision: Tensor, mask: Tensor) -> Tensor:
    """``[B, V]``: columns of the vision tokens; rows with fewer begin with their leftmost pads.

    ``mask`` ``[B, S]`` is of this call's columns.
    """
    width = int(is_vision.sum(1).max())
    rows = []
    for vision, real in zip(is_vision, mask, strict=True):
        columns, pads = vision.nonzero()[:, 0], (real == 0).nonzero()[:, 0]
        missing = width - len(columns)
        if missing > len(pads):
            raise ValueError("a row lacks pads: left-pad to max(text) + max(vision tokens)")
        rows.append(torch.cat((pads[:missing], columns)))
    return torch.stack(rows)


@torch.no_grad()
def embed(
    model: Any, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``inputs_embeds`` ``[B, S, D]`` with the image features in place, and ``vision_index``.

    ``model`` is a transformers vision-language model; images are in reading order of the batch.
    ``attention_mask`` may begin with the past.
    """
    is_vision = input_ids == model.config.image_token_id
    embeds: Tensor = model.get_input_embeddings()(input_ids)
    if pixel_values is not None and len(pixel_values):
        features = torch.cat(list(model.get_image_features(pixel_values).pooler_output))
        embeds = embeds.clone()
        embeds[is_vision] = features.to(embeds.dtype)
    return embeds, vision_index_of(is_vision, attention_mask[:, -input_ids.shape[1] :])
