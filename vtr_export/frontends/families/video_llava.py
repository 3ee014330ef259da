"""Video-LLaVA: images and frames through towers of their own, their tokens in reading order."""

from typing import Any

import torch
from torch import Tensor

from vtr_export.families import ModelFacts
from vtr_export.frontends.families.llava import dropped, seen_by
from vtr_export.frontends.feeds import Feed


def packed(
    model: Any, pixel_values: Tensor, pixel_values_videos: Tensor, pack_index: Tensor
) -> Tensor:
    """[tokens, D]: rows of ``pack_index`` of the images' tokens and then the frames'."""
    own = model.model
    images = seen_by(model, own.image_tower, pixel_values, dropped(model.config))
    frames = seen_by(model, own.video_tower, pixel_values_videos, 0)
    rows = torch.cat((images.flatten(0, 1), frames.flatten(0, 1)))
    return torch.index_select(rows, 0, pack_index)


def images_and_frames(facts: ModelFacts, dtype: torch.dtype) -> dict[str, Feed]:
    """``pixel_values`` [images, C, H, W], ``pixel_values_videos`` [frames, C, H, W], an index."""
    vision = facts.vision
    assert vision is not None
    assert vision.image_size is not None, "of one size"
    shape = (vision.channels, vision.image_size, vision.image_size)
    return {
        "pixel_values": Feed(torch.empty(2, *shape, dtype=dtype), ("images", None, None, None)),
        "pixel_values_videos": Feed(
            torch.empty(3, *shape, dtype=dtype), ("frames", None, None, None)
        ),
        "pack_index": Feed(torch.zeros(5, dtype=torch.long), ("tokens",)),
    }
