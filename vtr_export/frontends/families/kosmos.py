"""Kosmos-2: positions of a table, and a mask that its decoder would make anew."""

from typing import Any

from torch import Tensor
from torch.nn import functional


def follow(model: Any) -> None:
    """Have the decoder take its mask and its positions as they are given."""
    if model.config.model_type != "kosmos-2":
        return
    decoder = model.get_decoder()
    table = decoder.embed_positions

    def looked_up(*_: Any, position_ids: Tensor, **__: Any) -> Tensor:
        return functional.embedding(position_ids, table.weights)

    decoder._prepare_decoder_attention_mask = lambda mask, *_: mask
    table.forward = looked_up
