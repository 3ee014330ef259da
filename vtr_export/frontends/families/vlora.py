"""VLoRA: an image as low-rank weights."""

from typing import Any

from torch import Tensor


def weights(model: Any, pixel_values: Tensor) -> Tensor:
    """``A`` [images, groups, types, d, rank]."""
    found: Tensor = model.get_vision_weights(pixel_values)
    return found
