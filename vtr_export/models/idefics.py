"""Idefics' decoder as one stack: its blocks of cross-attention are layers, too."""

from typing import Any

from torch import Tensor, nn


class Gated(nn.Module):
    """One block, called as a layer is: its keys stand behind those that a cache holds."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block: Any = block

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        past_key_values: Any,
        cross_attention_states: Tensor,
        full_text_row_masked_out_mask: Tensor,
        **_: Any,
    ) -> Tensor:
        """Rows [B,S,D]; mask [B,1,S,T] bool; states [B,V,width]; [B,1,S,1] is 0 in a blind row."""

        def remember(_: nn.Module, args: Any, given: dict[str, Any]) -> Any:
            return args, {**given, "past_key_values": past_key_values}

        handle = self.block.cross_attn.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            rows: Tensor = self.block(
                hidden_states,
                image_hidden_states=cross_attention_states,
                image_attention_mask=attention_mask,
                cross_attention_gate=full_text_row_masked_out_mask[:, 0, :, 0],
            )
        finally:
            handle.remove()
        return rows


class Interleaved(nn.Module):
    """The layers of an ``IdeficsModel`` in the order in which its ``forward`` takes them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.embed_tokens, self.norm = model.embed_tokens, model.norm
        self.cross_width = int(model.config.vision_config.embed_dim)
        layers: list[nn.Module] = []
        for number, layer in enumerate(model.layers):
            block, rest = divmod(number, model.cross_layer_interval)
            layers += [] if rest else [Gated(model.gated_cross_attn_layers[block])]
            layers.append(layer)
        self.layers = nn.ModuleList(layers)

    def forward(self, inputs_embeds: Tensor, **given: Any) -> Tensor:
        """Rows [B,S,D] behind the last norm; each layer takes of ``given`` what it knows."""
        rows, beside = inputs_embeds, dict(given)
        beside.pop("use_cache", None)
        crossing = ("cross_attention_states", "full_text_row_masked_out_mask")
        own = {name: value for name, value in beside.items() if name not in crossing}
        for layer in self.layers:
            rows = layer(rows, **(beside if hasattr(layer, "block") else own))
        normed: Tensor = self.norm(rows)
        return normed
