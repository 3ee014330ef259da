"""VLoRA (2405.20339): an image becomes low-rank weights of the decoder, not tokens of the prompt.

Of every ``skip_layers`` layers the last one computes ``y = x Wᵀ + alpha / rank · (x A) Bᵀ`` in its
projections q, k, v and o, and ``mlp(x) + alpha / rank · (x A) Bᵀ`` (m). ``B`` is a parameter; ``A``
``[d, rank]`` is made of the image's features by a stack of decoder blocks for each of the five.
"""

import math
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import AutoConfig, AutoModel, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

TYPES: Final = "qkvom"
Added: TypeAlias = Callable[
    [str, Tensor], Tensor | float
]  # type, x → what the image adds to the projection of x


class VLoRAConfig(PretrainedConfig):  # type: ignore[misc]  # transformers has no types
    """``vlora_*`` are the weights generator's sizes; ``vlora_alpha`` None is the rank."""

    model_type = "vlora"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012 -- no field

    text_config: Any = None
    vision_config: Any = None
    vision_feature_layer: int = -2
    vlora_dim: int = 512
    vlora_depth: int = 8
    vlora_heads: int = 16
    vlora_mlp_ratio: int = 4
    vlora_rank: int = 64
    vlora_alpha: float | None = None
    skip_layers: int = 4
    tie_word_embeddings: bool = False

    def __post_init__(self, **others: Any) -> None:
        self.text_config = section(self.text_config, "llama")
        self.vision_config = section(self.vision_config, "clip_vision_model")
        super().__post_init__(**others)

    @property
    def groups(self) -> int:
        """Layers that an image changes."""
        return int(self.text_config.num_hidden_layers) // self.skip_layers


def section(given: Any, kind: str) -> PretrainedConfig:
    """A part of a configuration, however it is given."""
    if isinstance(given, PretrainedConfig):
        return given
    values = dict(given or {})
    return AutoConfig.for_model(values.pop("model_type", kind), **values)


class Mixing(nn.Module):
    """Attention of ``heads`` heads: rows ``[B, N, D]`` ask ``[B, M, D]``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, rows: Tensor, others: Tensor) -> Tensor:
        """Mixed values ``[B, N, D]``."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q(rows), self.k(others), self.v(others))
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """Queries attend to each other, then to the image; each step is normed first."""

    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = Mixing(dim, heads), Mixing(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """``[B, N, D]``."""
        rows = self.norm1(queries)
        queries = queries + self.self_attn(rows, rows)
        queries = queries + self.cross_attn(self.norm2(queries), features)
        found: Tensor = queries + self.fc2(gelu(self.fc1(self.norm3(queries))))
        return found


class Generator(nn.Module):
    """Features ``[B, N, dim]`` → ``A`` of one type, ``[B, groups, d, rank]``."""

    def __init__(self, config: VLoRAConfig) -> None:
        super().__init__()
        dim = config.vlora_dim
        self.shape = (config.text_config.hidden_size, config.vlora_rank)
        self.queries = nn.Parameter(torch.randn(1, config.groups, dim))
        sizes = dim, config.vlora_heads, config.vlora_mlp_ratio
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(config.vlora_depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, math.prod(self.shape))

    def forward(self, features: Tensor) -> Tensor:
        """One query a layer that is changed."""
        queries = self.queries.expand(features.shape[0], -1, -1)
        for block in self.blocks:
            queries = block(queries, features)
        weights: Tensor = self.head(self.norm(queries)).unflatten(-1, self.shape)
        return weights


class VLoRAAttention(LlamaAttention):  # type: ignore[misc]  # transformers has no types
    """LLaMA's, with what the image adds to each of its projections."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any,
        added: Added,
    ) -> Tensor:
        """``[B, S, d]``."""
        q, k, v = (
            (project(hidden_states) + added(kind, hidden_states))
            .unflatten(-1, (-1, self.head_dim))
            .transpose(1, 2)
            for kind, project in zip("qkv", (self.q_proj, self.k_proj, self.v_proj), strict=True)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling)[0]
        mixed = mixed.flatten(2)
        found: Tensor = self.o_proj(mixed) + added("o", mixed)
        return found


class VLoRALayer(LlamaDecoderLayer):  # type: ignore[misc]  # transformers has no types
    """A layer of LLaMA; ``group`` is its number among those that an image changes, or none."""

    def __init__(self, config: VLoRAConfig, layer_idx: int) -> None:
        text = config.text_config
        super().__init__(text, layer_idx)
        self.self_attn = VLoRAAttention(text, layer_idx)
        is_changed = (layer_idx + 1) % config.skip_layers == 0
        self.group = layer_idx // config.skip_layers if is_changed else -1
        self.scale = (config.vlora_alpha or config.vlora_rank) / config.vlora_rank
        widths = [self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj]
        sizes = [*(each.out_features for each in widths), self.hidden_size, self.hidden_size]
        self.low_rank = nn.ParameterDict(
            {
                kind: nn.Parameter(torch.zeros(size, config.vlora_rank))
                for kind, size in zip(TYPES, sizes, strict=True)
                if is_changed
            }
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        vision_weights: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """``vision_weights`` ``[B, groups, 5, d, rank]``; None: no image."""

        def added(kind: str, rows: Tensor) -> Tensor | float:
            if vision_weights is None or self.group < 0:
                return 0.0
            down = vision_weights[:, self.group, TYPES.index(kind)]
            update: Tensor = rows @ down @ self.low_rank[kind].T * self.scale
            return update

        rows = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(
            rows, position_embeddings, attention_mask, past_key_values, added
        )
        rows = self.post_attention_layernorm(hidden_states)
        left: Tensor = hidden_states + self.mlp(rows) + added("m", rows)
        return left


class VLoRAForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # no types
    """CLIP, five generators of weights, and LLaMA."""

    config_class = VLoRAConfig
    _supports_attention_backend = _supports_sdpa = True

    def __init__(self, config: VLoRAConfig) -> None:
        super().__init__(config)
        vision, dim = config.vision_config, config.vlora_dim
        self.vision_tower = AutoModel.from_config(vision)
        patches = (vision.image_size // vision.patch_size) ** 2
        self.visual_proj = nn.Linear(vision.hidden_size, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, patches, dim))
        self.generators = nn.ModuleDict({kind: Generator(config) for kind in TYPES})
        self.language_model = LlamaModel(config.text_config)
        depth = config.text_config.num_hidden_layers
        self.language_model.layers = nn.ModuleList(VLoRALayer(config, n) for n in range(depth))
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Whoever trains such a model draws its weights."""

    def get_decoder(self) -> nn.Module:
        """LLaMA."""
        found: nn.Module = self.language_model
        return found

    def get_input_embeddings(self) -> nn.Module:
        """LLaMA's."""
        found: nn.Module = self.language_model.embed_tokens
        return found

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def get_vision_weights(self, pixel_values: Tensor) -> Tensor:
        """``A`` of every layer that is changed and every type: ``[B, groups, 5, d, rank]``."""
        hidden = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        patches = hidden[self.config.vision_feature_layer][:, 1:]  # without CLS
        features = self.visual_proj(patches) + self.pos_embed
        return torch.stack([self.generators[kind](features) for kind in TYPES], dim=2)

    def beside(self, pixel_values: Tensor, *_: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the encoder gives, and what every call about these images is given: the same."""
        weights = self.get_vision_weights(pixel_values)
        return weights, {"vision_weights": weights}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        vision_weights: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """An image a row, as ``pixel_values`` or as the weights that were made of it."""
        if vision_weights is None and pixel_values is not None:
            vision_weights = self.get_vision_weights(pixel_values)
        said = self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            vision_weights=vision_weights,
        )
        hidden = said.last_hidden_state[:, -logits_to_keep:]
        return CausalLMOutputWithPast(
            logits=self.lm_head(hidden), past_key_values=said.past_key_values
        )
