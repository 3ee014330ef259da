"""What a decoder is given of images beside its tokens, the same in every call."""

import torch

from vtr_export.families import ModelFacts
from vtr_export.frontends.feeds import Feed


def feeds_beside(facts: ModelFacts, batch: int, dtype: torch.dtype) -> dict[str, Feed]:
    """Low-rank weights, or keys and their places.

    ``vision_weights`` [B, groups, types, d, rank] is an image's, for each row; ``vision_keys``
    [B, V, width] are all images' of a row, and ``vision_places`` [B, V] int64 the positions of
    their tokens; pads stand behind every row.
    """
    if facts.features == "weights":
        example = torch.empty(batch, *facts.feature_shape, dtype=dtype)
        return {"vision_weights": Feed(example, ("batch", *(None for _ in facts.feature_shape)))}
    if facts.features == "keys":
        keys, axes = 7, ("batch", "vision")
        return {
            "vision_keys": Feed(
                torch.empty(batch, keys, *facts.feature_shape, dtype=dtype), (*axes, None)
            ),
            "vision_places": Feed(torch.zeros(batch, keys, dtype=torch.long), axes),
        }
    return {}
