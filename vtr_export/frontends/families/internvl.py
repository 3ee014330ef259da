"""InternVL: transformers' accessor, and the order of tokens that older checkpoints have."""

from typing import Any

from torch import Tensor


def features(model: Any, pixel_values: Tensor) -> Tensor:
    """[tiles, tokens, D]. With ``ps_version`` v1 a tile's tokens go column by column."""
    found: Tensor = model.get_image_features(pixel_values).pooler_output
    if getattr(model.config, "ps_version", "v2") != "v1":
        return found
    tiles, tokens, width = found.shape
    side = round(tokens**0.5)
    return found.view(tiles, side, side, width).transpose(1, 2).reshape(tiles, tokens, width)
