"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: transformers' tower; what depends on grids is an input."""

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from vtr_export.families import ModelFacts
from vtr_export.frontends.feeds import Feed
from vtr_export.frontends.packed import NAME, Groups

KINDS: Final = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


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
    if vision.grid is not None:
        taps = torch.zeros(tokens, unit, 4)
        feeds |= {
            "interp_indices": Feed(taps.long(), ("tokens", None, None)),
            "interp_weights": Feed(taps, ("tokens", None, None)),
        }
    return feeds


def merged(model: Any, pixel_values: Tensor, position_ids: Tensor, **feeds: Tensor) -> Tensor:
    """[tokens, D]: all images' patches in one row, through the tower's blocks and its merger.

    Where DeepStack takes features of blocks in between, they stand behind: [tokens, (1 + n) D].
    """
    tower = model.model.visual
    tower.config._attn_implementation = NAME
    frames = Groups.of(feeds["frames"], feeds["frame_places"])
    windows, whole = frames, range(len(tower.blocks))
    if "windows" in feeds:
        windows = Groups.of(feeds["windows"], feeds["window_places"])
        whole = tower.fullatt_block_indexes
    hidden = embedded(tower, pixel_values)
    if "interp_indices" in feeds:
        near = tower.pos_embed(feeds["interp_indices"].flatten(0, 1))
        blend = near * feeds["interp_weights"].flatten(0, 1)[:, :, None]
        hidden = hidden + blend.sum(1).to(hidden.dtype)
    tables = tower.rotary_pos_emb(hidden, position_ids.flatten(0, 1))
    taken, planes = list(getattr(tower, "deepstack_visual_indexes", ())), []
    for number, block in enumerate(tower.blocks):
        seen = frames if number in whole else windows
        hidden = block(hidden, cu_seqlens=seen, max_seqlen=1, position_embeddings=tables)
        if number in taken:
            planes.append(tower.deepstack_merger_list[taken.index(number)](hidden))
    return torch.cat([tower.merger(hidden), *planes], dim=-1)


def embedded(tower: Any, pixel_values: Tensor) -> Tensor:
    """[patches, C]: the patches' convolution, whose kernel is a patch, as a product."""
    weight, bias = tower.patch_embed.proj.weight, tower.patch_embed.proj.bias
    return functional.linear(pixel_values.flatten(0, 1), weight.flatten(1), bias)
