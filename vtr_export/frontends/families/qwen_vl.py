"""Qwen2-VL and Qwen2.5-VL: transformers' own tower, with what depends on grids as inputs."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vtr_export.families import ModelFacts
from vtr_export.frontends.feeds import Feed
from vtr_export.frontends.packed import NAME, Groups


def patches(facts: ModelFacts, dtype: torch.dtype) -> dict[str, Feed]:
    """What ``runtime.images.patches`` makes of images."""
    vision = facts.vision
    assert vision is not None
    tokens, unit = 6, vision.merge**2
    places = torch.zeros(tokens, unit, dtype=torch.long)
    values = torch.empty(tokens, unit, vision.patch_values, dtype=dtype)
    feeds = {
        "pixel_values": Feed(values, ("tokens", None, None)),
        "position_ids": Feed(torch.stack([places] * 2, 2), ("tokens", None, None)),
        "frames": Feed(torch.zeros(2, places.numel()).long(), ("frames", "longest")),
        "frame_places": Feed(places, ("tokens", None)),
    }
    if vision.window is not None:
        index = torch.zeros(3, vision.window**2 * unit).long()
        feeds |= {
            "windows": Feed(index, ("windows", None)),
            "window_places": Feed(places.clone(), ("tokens", None)),
        }
    return feeds


def merged(model: Any, pixel_values: Tensor, position_ids: Tensor, **groups: Tensor) -> Tensor:
    """[tokens, D]: all images' patches in one row, through the tower's blocks and its merger."""
    tower = model.model.visual
    tower.config._attn_implementation = NAME
    frames = Groups.of(groups["frames"], groups["frame_places"])
    windows, whole = frames, range(len(tower.blocks))
    if "windows" in groups:
        windows = Groups.of(groups["windows"], groups["window_places"])
        whole = tower.fullatt_block_indexes
    hidden = embedded(tower, pixel_values)
    tables = tower.rotary_pos_emb(hidden, position_ids.flatten(0, 1))
    for number, block in enumerate(tower.blocks):
        seen = frames if number in whole else windows
        hidden = block(hidden, cu_seqlens=seen, max_seqlen=1, position_embeddings=tables)
    features: Tensor = tower.merger(hidden)
    return features


def embedded(tower: Any, pixel_values: Tensor) -> Tensor:
    """[patches, C]: the patches' convolution, whose kernel is a patch, as a product."""
    weight, bias = tower.patch_embed.proj.weight, tower.patch_embed.proj.bias
    return functional.linear(pixel_values.flatten(0, 1), weight.flatten(1), bias)
