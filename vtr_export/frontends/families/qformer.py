"""InstructBLIP: a ViT's features, which a Q-Former asks with the prompt beside its queries."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vtr_export.families import ModelFacts
from vtr_export.frontends.feeds import Feed


def image_and_question(facts: ModelFacts, dtype: torch.dtype) -> dict[str, Feed]:
    """``pixel_values`` [images, channels, H, W]; the Q-Former's own tokens [images, question]."""
    vision = facts.vision
    assert vision is not None
    side, axes = vision.image_size, ("images", "question")
    assert side is not None, "images have one size"
    pixels = torch.empty(2, vision.channels, side, side, dtype=dtype)
    return {
        "pixel_values": Feed(pixels, ("images", None, None, None)),
        "qformer_input_ids": Feed(torch.zeros(2, 3, dtype=torch.long), axes),
        "qformer_attention_mask": Feed(torch.ones(2, 3, dtype=torch.long), axes),
    }


def asked(
    model: Any, pixel_values: Tensor, qformer_input_ids: Tensor, qformer_attention_mask: Tensor
) -> Tensor:
    """[images, queries, D]: queries and question see each other, queries alone see the image."""
    images = model.vision_model(pixel_values).last_hidden_state
    return questioned(model, images, qformer_input_ids, qformer_attention_mask)


def asked_of_frames(
    model: Any, pixel_values: Tensor, qformer_input_ids: Tensor, qformer_attention_mask: Tensor,
    **_: Any,
) -> BaseModelOutputWithPooling:  # fmt: skip
    """[videos, frames x queries, D] of ``pixel_values`` [videos, frames, channels, H, W]."""
    frames = pixel_values.shape[1]
    images = model.vision_model(pixel_values.flatten(0, 1)).last_hidden_state
    ids, mask = (
        each[:, None].expand(-1, frames, -1).flatten(0, 1)
        for each in (qformer_input_ids, qformer_attention_mask)
    )
    rows = questioned(model, images, ids, mask)
    own = rows.reshape(-1, frames * rows.shape[1], rows.shape[2])
    return BaseModelOutputWithPooling(pooler_output=own)


def questioned(model: Any, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """[images, queries, D] of a tower's features [images, patches, width]; positions count on."""
    former = model.qformer
    queries = model.query_tokens.expand(images.shape[0], -1, -1)
    count = queries.shape[1]
    places = torch.arange(ids.shape[1])[None]
    hidden = former.embeddings(ids, position_ids=places, query_embeds=queries)
    real = torch.cat((torch.ones(queries.shape[:2], dtype=torch.bool), mask != 0), 1)
    seen = real[:, None, None, :].expand(-1, 1, hidden.shape[1], -1)
    found = former.encoder(
        hidden, attention_mask=seen, encoder_hidden_states=images, query_length=count
    ).last_hidden_state
    projected: Tensor = model.language_projection(found[:, :count])
    return projected
