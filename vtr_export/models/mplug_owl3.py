"""mPLUG-Owl3 (2408.04840; as of 241101): images are keys beside those of text, in a few layers.

A hyper layer projects image features by a ``v_kv_proj`` of its own, turns the keys by the angle of
their image's place in the prompt (MI-RoPE), and puts them before the text's: one softmax over both.
A row at position t sees image j where t is at or behind its place.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from vtr_export.models.vlora import section

NOWHERE: Final = 2**31 - 1  # the place of a pad among keys: no row stands behind it


class MPlugOwl3Config(PretrainedConfig):  # type: ignore[misc]  # transformers has no types
    """``hyper_layers`` count from 1, as the model's own file does."""

    model_type = "mplug_owl3"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012 -- no field

    text_config: Any = None
    vision_config: Any = None
    hyper_layers: Any = (1, 9, 17, 25)
    image_token_id: int = 151646
    vision_feature_layer: int = -2
    tie_word_embeddings: bool = False

    def __post_init__(self, **others: Any) -> None:
        self.text_config = section(self.text_config, "qwen2")
        self.vision_config = section(self.vision_config, "siglip_vision_model")
        super().__post_init__(**others)


class HyperAttention(Qwen2Attention):  # type: ignore[misc]  # transformers has no types
    """Qwen2's; ``hyper`` is the layer's number among hyper layers, or -1."""

    def __init__(self, config: MPlugOwl3Config, layer_idx: int) -> None:
        text, hyper = config.text_config, list(config.hyper_layers)
        super().__init__(text, layer_idx)
        self.hyper = hyper.index(layer_idx + 1) if layer_idx + 1 in hyper else -1
        if self.hyper >= 0:
            self.v_kv_proj = nn.Linear(text.hidden_size, 2 * self.k_proj.out_features)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        vision_keys: Tensor | None = None,
        vision_rotary: Any = None,
        vision_seen: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """``vision_keys`` ``[B, V, hyper layers · 2 · kv]``; ``vision_seen`` ``[B, 1, S, V]``."""
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if self.hyper >= 0 and vision_keys is not None:
            width = self.v_kv_proj.out_features
            own = vision_keys[..., self.hyper * width : (self.hyper + 1) * width]
            heads = own.reshape(*own.shape[:2], -1, 2, self.head_dim).transpose(1, 2)
            image_keys, image_values = heads[..., 0, :], heads[..., 1, :]
            _, image_keys = apply_rotary_pos_emb(image_keys, image_keys, *vision_rotary)
            attention_mask = _joined(vision_seen, attention_mask, q, k)
            k, v = torch.cat((image_keys, k), 2), torch.cat((image_values, v), 2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling)[0]
        return self.o_proj(mixed.flatten(2)), None


def _joined(seen: Any, mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """The masks of image keys and of the text's ``[B, 1, S, T]``: bool, or added to logits."""
    shape = q.shape[0], 1, q.shape[2], k.shape[2]
    if mask is None:
        rows, keys = shape[2:]
        mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, lowest)
    return torch.cat((seen, mask.expand(shape)), -1)


class MPlugOwl3ForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # no types
    """SigLIP, a linear projection, and Qwen2 with hyper layers."""

    config_class = MPlugOwl3Config
    _supports_attention_backend = _supports_sdpa = True

    def __init__(self, config: MPlugOwl3Config) -> None:
        super().__init__(config)
        text = config.text_config
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.vision2text_model = nn.Linear(config.vision_config.hidden_size, text.hidden_size)
        self.language_model = Qwen2Model(text)
        for number, layer in enumerate(self.language_model.layers):
            layer.self_attn = HyperAttention(config, number)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Whoever trains such a model draws its weights."""

    def get_decoder(self) -> nn.Module:
        """Qwen2."""
        found: nn.Module = self.language_model
        return found

    def get_input_embeddings(self) -> nn.Module:
        """Qwen2's."""
        found: nn.Module = self.language_model.embed_tokens
        return found

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def get_vision_keys(self, pixel_values: Tensor) -> Tensor:
        """``[images, L, hyper layers · 2 · kv]``: keys, not turned yet, and values of each."""
        hidden = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        features = self.vision2text_model(hidden[self.config.vision_feature_layer])
        attentions = [layer.self_attn for layer in self.language_model.layers]
        hyper = sorted((each for each in attentions if each.hyper >= 0), key=lambda a: a.hyper)
        return torch.cat([each.v_kv_proj(features) for each in hyper], -1)

    def beside(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the encoder gives, and what every call about these images is given: the same.

        Images are in reading order of the image tokens of ``input_ids`` ``[B, S]``.
        """
        features = self.get_vision_keys(pixel_values)
        each, start = features.shape[1], 0
        is_image = (input_ids == self.config.image_token_id) & (attention_mask != 0)
        counts = is_image.sum(1).tolist()
        keys = features.new_zeros(len(input_ids), max(counts) * each, features.shape[2])
        places = torch.full(keys.shape[:2], NOWHERE, device=keys.device)
        for row, count in enumerate(counts):
            before = attention_mask[row].cumsum(0)[is_image[row]] - 1
            keys[row, : count * each] = features[start : start + count].flatten(0, 1)
            places[row, : count * each] = before.repeat_interleave(each)
            start += count
        return features, {"vision_keys": keys, "vision_places": places}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        vision_keys: Tensor | None = None,
        vision_places: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """``vision_keys`` and ``vision_places`` are ``beside``'s."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (
                torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past
            )
        vision: dict[str, Any] = {}
        if vision_keys is not None and vision_places is not None:
            seen = position_ids[:, None, :, None] >= vision_places[:, None, None, :]
            vision = {
                "vision_keys": vision_keys,
                "vision_rotary": self.language_model.rotary_emb(vision_keys, vision_places),
                "vision_seen": seen,
            }
        said = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **vision,
        )
        hidden = said.last_hidden_state[:, -logits_to_keep:]
        return CausalLMOutputWithPast(
            logits=self.lm_head(hidden), past_key_values=said.past_key_values
        )
