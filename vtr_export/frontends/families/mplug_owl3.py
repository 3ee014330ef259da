"""mPLUG-Owl3: an image as keys and values of every hyper layer."""

from typing import Any

from torch import Tensor


def keys(model: Any, pixel_values: Tensor) -> Tensor:
    """[images, L, hyper layers · 2 · kv]."""
    found: Tensor = model.get_vision_keys(pixel_values)
    return found
