"""What a decoder is given of images beside its tokens, the same in every call."""

import torch

from vtr_export.families import ModelFacts
from vtr_export.frontends.feeds import Feed


def feeds_beside(facts: ModelFacts, batch: int, dtype: torch.dtype) -> dict[str, Feed]:
    """``vision_weights`` [B, groups, types, d, rank]: an image's, for each row."""
    if facts.features != "weights":
        return {}
    example = torch.empty(batch, *facts.feature_shape, dtype=dtype)
    return {"vision_weights": Feed(example, ("batch", *(None for _ in facts.feature_shape)))}
