"""What Gemma 4 has of its own: embeddings of a token for each layer, and masks for two kinds.

Embeddings for the layers stand beside the first: [B, S, D + L P]. An image's tokens have a pad's.
"""

from typing import Any

import torch
from torch import Tensor

from vtr_export.families import ModelFacts


def beside(model: Any) -> int:
    """Numbers of a token that stand beside its embedding."""
    config = model.get_decoder().config
    each = getattr(config, "hidden_size_per_layer_input", None) or 0
    return int(each * config.num_hidden_layers)


def embedded(model: Any, input_ids: Tensor) -> Tensor:
    """[B, S, D], or [B, S, D + L P], where the word for an image is a pad."""
    table = model.get_input_embeddings()
    if not beside(model):
        found: Tensor = table(input_ids)
        return found
    pad = model.config.get_text_config().pad_token_id
    ids = torch.where(input_ids == model.config.image_token_id, pad, input_ids)
    return torch.cat((table(ids), model.get_decoder().embed_tokens_per_layer(ids)), -1)


def spread(model: Any, embeds: Tensor) -> dict[str, Tensor]:
    """The arguments of the model's ``forward`` that ``embeds`` are."""
    if not (width := beside(model)):
        return {"inputs_embeds": embeds}
    layers = model.get_decoder().config.num_hidden_layers
    others = embeds[..., -width:].reshape(*embeds.shape[:-1], layers, -1)
    return {"inputs_embeds": embeds[..., :-width], "per_layer_inputs": others}


def has_two_masks(model: Any, facts: ModelFacts) -> bool:
    """Whether an image's tokens see each other in layers with a window alone."""
    return bool(facts.attends == "images" and model.config.model_type == "gemma4")


def of_kinds(masks: list[Tensor]) -> Any:
    """One mask for all layers; or for those with a window, and for the others."""
    if len(masks) == 1:
        return masks[0]
    return dict(zip(("sliding_attention", "full_attention"), masks, strict=True))
