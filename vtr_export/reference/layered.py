"""What Gemma 4 hands each layer beside its rows, and which of its layers see images whole."""

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

Handed: TypeAlias = Any  # by layer: what it is called with beside its rows
NAME: Final = "per_layer_input"


def width_of(decoder: Any) -> int:
    """Of what each layer is handed of a token; 0: nothing."""
    config = getattr(decoder, "config", None)
    return getattr(config, "hidden_size_per_layer_input", None) or 0


def given(decoder: Any, hidden: Tensor, beside: Tensor | None = None) -> Mapping[str, Tensor]:
    """What the decoder's ``forward`` takes: ``beside`` ``[B, S, L P]``, or zeros."""
    if not (width := width_of(decoder)):
        return {}
    shape = *hidden.shape[:2], len(decoder.layers), width
    return {"per_layer_inputs": hidden.new_zeros(shape) if beside is None else beside.view(shape)}


def apart(decoder: Any, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows, and what stands beside them."""
    if not width_of(decoder):
        return embeds, None
    width = decoder.config.hidden_size
    return embeds[..., :width], embeds[..., width:]


def noted(handed: Handed) -> tuple[Tensor, ...]:
    """What each layer was handed: ``[B, S, P]``."""
    return tuple(note[NAME] for note in handed)


def again(handed: Handed, layered: tuple[Tensor, ...]) -> Handed:
    """The same, on other rows."""
    if not layered:
        return handed
    return [{**note, NAME: own} for note, own in zip(handed, layered, strict=True)]


def sees_groups(decoder: Any, index: int) -> bool:
    """Whether tokens of one group see each other in layer ``index``."""
    config = getattr(decoder, "config", None)
    if getattr(config, "model_type", "") != "gemma4_text":
        return True
    return bool(decoder.config.layer_types[index] == "sliding_attention")


class Embeddings(nn.Module):
    """Two tables side by side, where the word for an image is a pad."""

    def __init__(self, model: Any, table: nn.Module, per_layer: nn.Module) -> None:
        super().__init__()
        self.table, self.per_layer, self.config = table, per_layer, model.config

    def forward(self, input_ids: Tensor) -> Tensor:
        """``[B, S]`` → ``[B, S, D + L P]``."""
        pad = self.config.get_text_config().pad_token_id
        ids = torch.where(input_ids == self.config.image_token_id, pad, input_ids)
        return torch.cat((self.table(ids), self.per_layer(ids)), -1)
