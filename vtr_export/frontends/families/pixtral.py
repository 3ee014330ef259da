"""Pixtral's tower, and what is made of its features: in Mistral 3, in LLaVA, in LightOnOCR."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vtr_export.frontends.packed import NAME, Groups


def merged(model: Any, pixel_values: Tensor, position_ids: Tensor, **groups: Tensor) -> Tensor:
    """[tokens, D]: all images' patches in one row, the selected layers' features projected."""
    tower, projector = parts(model.model)
    layers = getattr(model.config, "vision_feature_layer", -1)
    frames = Groups.of(groups["frames"], groups["frame_places"])
    states = encoded(tower, pixel_values, position_ids, frames)
    chosen = [layers] if isinstance(layers, int) else layers
    features = torch.cat([states[layer] for layer in chosen], dim=-1)
    if hasattr(projector, "patch_merger"):
        return with_merger(projector, features, pixel_values.shape[1])
    found: Tensor = projector(features)
    return found


def parts(core: Any) -> tuple[Any, Any]:
    """Tower and projector, as they are called in LightOnOCR and elsewhere."""
    if hasattr(core, "vision_encoder"):
        return core.vision_encoder, core.vision_projection
    return core.vision_tower, core.multi_modal_projector


def encoded(tower: Any, pixel_values: Tensor, position_ids: Tensor, frames: Groups) -> list[Tensor]:
    """[patches, C] before the first layer and after each; the patch convolution as a product."""
    tower.config._attn_implementation = NAME
    weight = tower.patch_conv.weight.flatten(1)
    hidden = tower.ln_pre(functional.linear(pixel_values.flatten(0, 1), weight)[None])
    tables = tower.patch_positional_embedding(hidden, position_ids.flatten(0, 1))
    states = [hidden]
    for layer in tower.transformer.layers:
        states.append(layer(states[-1], None, position_embeddings=tables, cu_seq_lens_q=frames))
    return [state[0] for state in states]


def with_merger(projector: Any, features: Tensor, unit: int) -> Tensor:
    """``unit`` patches of a token lie together, as ``unfold`` would put them."""
    blocks = projector.norm(features).unflatten(0, (-1, unit)).transpose(1, 2).flatten(1)
    hidden = projector.act(projector.linear_1(projector.patch_merger.merging_layer(blocks)))
    found: Tensor = projector.linear_2(hidden)
    return found
