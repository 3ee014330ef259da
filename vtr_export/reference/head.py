"""What a model makes of its decoder's last hidden states: its head, and what bends the logits."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast


class _Passed(MoeModelOutputWithPast):  # type: ignore[misc]  # transformers has no types
    """What a decoder that was passed over would have given."""

    shared_kv_states = None  # Gemma 4's
    cross_attentions = None  # Kosmos-2's


class Head(nn.Module):
    """Hidden states ``[B, S, D]`` → logits, by ``model``'s own forward around its decoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: the model is not a child

    def forward(self, hidden: Tensor) -> Tensor:
        """The decoder is passed over: ``hidden`` is what it would have given, without a router."""
        (model,) = self._model
        decoder = model.get_decoder()
        if model.config.model_type == "idefics":  # nothing stands between
            return cast("Tensor", model.lm_head(hidden))
        per_layer = getattr(decoder.config, "hidden_size_per_layer_input", None)
        if hasattr(model, "qformer"):  # around the decoder there is but its language model
            model = model.language_model
        if model.config.model_type == "kosmos-2":
            model = model.text_model
        own = decoder.forward
        decoder.forward = lambda *_, **__: _Passed(last_hidden_state=hidden)
        try:
            said = model(
                inputs_embeds=hidden,
                attention_mask=hidden.new_ones((1, 1, 1, 1), dtype=torch.bool),
                position_ids=torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device),
                use_cache=False,
                **({"per_layer_inputs": hidden} if per_layer else {}),  # of no use to a head
            )
        finally:
            decoder.forward = own
        return cast("Tensor", said.logits)
