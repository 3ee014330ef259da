"""Idefics: blocks of cross-attention as layers that have a cache, and words of two tables."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtr_export.models.idefics import Gated


def keys(model: Any, pixel_values: Tensor) -> Tensor:
    """[images, latents or tokens, width of the tower]."""
    whole = model.model
    seen: Tensor = whole.vision_model(pixel_values=pixel_values).last_hidden_state
    return whole.perceiver_resampler(seen) if model.config.use_resampler else seen


def decoded(model: Any, asked: Mapping[str, Any], crossing: Any) -> Tensor:
    """Logits of the last position. A row that sees no image takes nothing of a key of zeros."""
    decoder, cache, rows = model.get_decoder(), asked["past_key_values"], asked["inputs_embeds"]
    for number, layer in enumerate(decoder.layers):
        if isinstance(layer, Gated):
            rows = _crossed(layer.block, rows, crossing, partial(cache.update, layer_idx=number))
            continue
        layer.self_attn.layer_idx = number  # of the cache
        rows = layer(
            rows,
            attention_mask=asked["attention_mask"],
            position_ids=asked["position_ids"],
            past_key_values=cache,
        )
    logits: Tensor = model.lm_head(decoder.norm(rows[:, -1:]))
    return logits


def _crossed(block: Any, rows: Tensor, crossing: Any, remember: Any) -> Tensor:
    """A block, whose keys are normed before they are held."""
    attention = block.cross_attn

    def heads(projected: Tensor) -> Tensor:
        split = (*projected.shape[:2], -1, attention.head_dim)
        return projected.reshape(split).transpose(1, 2)

    query = heads(attention.q_proj(block.input_layernorm(rows)))
    key, value = (heads(own(crossing.states)) for own in (attention.k_proj, attention.v_proj))
    if attention.qk_layer_norms:
        query, key = attention.q_layer_norm(query), attention.k_layer_norm(key)
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    given = (query, *remember(key, value), crossing.mask)
    mixed = attend(attention, *given, scaling=attention.scaling)[0]
    rows = rows + block.act_cross_attn(block.alpha_cross_attn) * attention.o_proj(mixed.flatten(2))
    more = block.mlp(block.post_attention_layernorm(rows))
    left: Tensor = rows + block.act_dense(block.alpha_dense) * more
    return left


def look_up(model: Any) -> None:
    """Have words of both tables be looked up in both, as no length may depend on ids."""
    table = model.get_input_embeddings()
    if model.config.model_type == "idefics" and table.num_additional_embeddings:
        table.forward = partial(_either, table)


def _either(table: Any, input_ids: Tensor) -> Tensor:
    first = table.num_embeddings
    own = functional.embedding(input_ids.clamp(max=first - 1), table.weight)
    more = table.additional_embedding((input_ids - first).clamp(min=0))
    return torch.where((input_ids < first)[..., None], own, more)
