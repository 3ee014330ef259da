"""Tiny configurations of every image-text-to-text architecture: general rules, few exceptions.

A configuration starts as its class' defaults. Sizes shrink by their name and by the part they are
in (decoder or tower); lists with one entry a layer lose layers, so that each kind of layer stays.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from zoo_exceptions import EXCEPTIONS, REMOVE

Section = dict[str, Any]
ARCHITECTURES = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
VOCAB, POSITIONS, IMAGE_SIZE, PATCH = 64, 1024, 32, 4  # pixels, the last two
PAD, BOS, EOS, UNKNOWN, IMAGE, VIDEO, AUDIO = range(7)


@dataclass(frozen=True)
class Sizes:
    """Of one part of a model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int = 8


DECODER, TOWER = Sizes(4, 32, 4, 2), Sizes(2, 16, 2, 2)
TEXT_PARTS = ("text_config", "decoder", "vlm_config", "dit_config")

# names of fields (whole), and what they become in a part of these sizes
NAMED: tuple[tuple[str, Any], ...] = (
    (r"(num_(hidden_|decoder_)?|n_|encoder_|decoder_)?layers|depth", lambda s: s.layers),
    (r"hidden_size|hidden_dim|d_model|embed_dim|word_embed_proj_dim", lambda s: s.hidden),
    (r"ple_embed_dim|adapter_in_dim|adapter_input_size|altup_hidden", lambda s: s.hidden),
    (r"\w*intermediate_size(_mlp)?|(\w+_)?ffn_dim|d_ff|mlp_dim|moe_hidden_size|share_expert_dim",
     lambda s: 2 * s.hidden),
    (r"(\w*_)?num_(sliding_)?attention_heads|(encoder_|decoder_)?attention_heads|num_heads|"
     r"(global_)?num_attention_heads", lambda s: s.heads),
    (r"(\w*_)?num_(global_)?(key_value|kv)_heads", lambda s: s.kv_heads),
    (r"qk_head_dim", lambda s: 2 * s.head_dim),  # one half turns
    (r"(\w*_)?head_dim|d_kv", lambda s: s.head_dim),
    (r"(q|kv|o)_lora_rank|laurel_rank|hidden_size_per_layer_input|hc_lowrank", 16),
    (r"out_hidden_size|text_hidden_size|adapter_out_dim|output_dim|decoder_hidden_size|"
     r"image_text_hidden_size|projection_dim|projector_output_dim", DECODER.hidden),
    (r"encoder_hidden_size|vision_hidden_size", TOWER.hidden),
    (r"(projector|projection)_(hidden|intermediate)_(size|dim)", 24),
    (r"(unpadded_)?vocab_size(_per_layer_input)?", VOCAB),
    (r"(\w+_)?max_position_embeddings|max_source_positions|max_sequence_length", POSITIONS),
    (r"(\w*_)?image_size", IMAGE_SIZE),
    (r"patch_size", PATCH),
    (r"num_(local_|routed_)?experts|(n_routed|moe_num|num)_experts", 4),
    (r"num_experts_per_tok|moe_k|moe_topk|top_k_experts", 2),
    (r"(n|moe_num)_shared_experts", 1),
    (r"n_group|topk_group", 1),
    (r"(attention_)?(sliding_window(_size)?|chunk_size)", 8),
    (r"(\w*_)?num_query_tokens|num_latents|latent_query_num|resampler_n(um)?_latents", 4),
    (r"num_position_embeddings|position_embedding_size", (IMAGE_SIZE // PATCH) ** 2),
    (r"(max_)?pos_emb_(height|width)|posemb_grid_size", IMAGE_SIZE // PATCH),
    (r"index_topk|canvas_length", 8),
    (r"index_block_size|index_kpool", 4),
    (r"index_topk_blocks", 2),
    (r"mm_tokens_per_image|image_seq_length", 16),
    (r"downsample_hidden_size", 8),
    (r"deepstack_visual_indexes", [0, 1]),
    (r"query_pre_attn_scalar", lambda s: s.head_dim),
    (r"attention_multiplier", lambda s: s.head_dim**-0.5),
    (r"image_grid_pinpoints", [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE],
                               [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]),
)  # fmt: skip
IDS = {"pad": PAD, "bos": BOS, "eos": EOS, "unk": UNKNOWN, "image": IMAGE, "image_patch": IMAGE,
       "video": VIDEO, "audio": AUDIO, "decoder_start": BOS, "forced_eos": EOS}  # fmt: skip
TOKEN_ID = re.compile(r"_?(\w+?)_(?:token_)?(?:id|ids|index)")
INDICES = re.compile(  # lists of layers
    r"moe_layers|kv_source_layers|cross_attention_layers|fullatt_block_indexes|global_attn_indexes|"
    r"intermediate_layers_indices|full_attn_idxs|rope_scaling_layers"
)


def tiny_config(model_type: str) -> PretrainedConfig:
    """The class' defaults, shrunk; a decoder has four layers where every kind of layer fits."""
    kind = CONFIG_MAPPING[model_type]
    values = kind().to_dict()
    if "vision_config" in values and values["vision_config"] is None:  # may be absent: text alone
        values["vision_config"] = CONFIG_MAPPING[f"{model_type}_vision"]().to_dict()
    values = shrink(values, DECODER, {})
    config: PretrainedConfig = kind(**values)
    return config


def shrink(section: Section, sizes: Sizes, ids: dict[str, int]) -> Section:
    """``section`` with small sizes; its own sections shrink to the sizes of their kind."""
    kind = section.get("model_type")
    if "kv_lora_rank" in section:  # latent attention: every head has its own key and value
        sizes = replace(sizes, kv_heads=sizes.heads)
    found = {
        key: _small(key, value, sizes, ids)
        for key, value in _fewer_layers(section, sizes.layers).items()
        if key not in REMOVE
    }
    return merged(found, EXCEPTIONS.get(str(kind), {}))


def merged(section: Mapping[str, Any], changes: Mapping[str, Any]) -> Section:
    """``changes`` on top, section by section; a section without model_type is replaced."""
    result = dict(section)
    for key, value in changes.items():
        old = result.get(key)
        nested = isinstance(value, Mapping) and isinstance(old, Mapping) and "model_type" in old
        result[key] = merged(old, value) if nested else value
    return result


def _small(key: str, value: Any, sizes: Sizes, ids: dict[str, int]) -> Any:
    if key == "per_layer_config":
        return {n: shrink(changes, sizes, ids) for n, changes in (value or {}).items()}
    if isinstance(value, dict) and "model_type" in value:
        return shrink(value, DECODER if key in TEXT_PARTS else TOWER, ids)
    if key in ("rope_parameters", "rope_scaling"):
        return _small_rope(value, sizes)
    if key in ("image_token_id", "image_token_index"):
        return IMAGE
    if not value or isinstance(value, (bool, str, dict)):
        return value
    if (found := TOKEN_ID.fullmatch(key)) is not None:
        return _small_id(found[1], value, ids)
    return _small_size(key, value, sizes)


def _small_size(key: str, value: Any, sizes: Sizes) -> Any:
    for pattern, size in NAMED:
        if re.fullmatch(pattern, key):
            new = size(sizes) if callable(size) else size
            each = isinstance(value, list) and not isinstance(new, list)
            return [new] * len(value) if each else new
    return value


def _small_id(name: str, value: Any, ids: dict[str, int]) -> Any:
    if isinstance(value, list):
        return [_small_id(f"{name}.{index}", one, ids) for index, one in enumerate(value)]
    if not isinstance(value, int):
        return value
    return IDS[name] if name in IDS else ids.setdefault(name, len(ids) + AUDIO + 1)


def _small_rope(value: Any, sizes: Sizes) -> Any:
    """Rope as it was; the sections of mRoPE fill half a head."""
    if not isinstance(value, dict):
        return value
    if any(isinstance(one, dict) for one in value.values()):
        return {key: _small_rope(one, sizes) for key, one in value.items()}
    sections = value.get("mrope_section")
    if sections is None:
        return value
    half = sizes.head_dim // 2
    rest = half // len(sections)
    return value | {
        "mrope_section": [half - rest * (len(sections) - 1)] + [rest] * (len(sections) - 1)
    }


def _fewer_layers(section: Section, wanted: int) -> Section:
    """What is said layer by layer (lists, indices, overrides), said of ``wanted`` layers."""
    depth = next(
        (section[name] for name in ("num_hidden_layers", "depth") if name in section), None
    )
    if not isinstance(depth, int) or depth <= wanted:
        return section
    lists = {k: v for k, v in section.items() if isinstance(v, list) and len(v) == depth}
    indices = {k: v for k, v in section.items() if INDICES.fullmatch(k) and isinstance(v, list)}
    overrides = {int(k): v for k, v in (section.get("per_layer_config") or {}).items()}
    marks = [[layer in found for layer in range(depth)] for found in indices.values()]
    special = [overrides.get(layer) for layer in range(depth)]
    chosen = _layers_of_every_kind([*zip(*lists.values(), *marks, special, strict=True)], wanted)
    place = {layer: new for new, layer in enumerate(chosen)}
    few = {key: [value[layer] for layer in chosen] for key, value in lists.items()}
    few |= {k: [place[layer] for layer in v if layer in place] for k, v in indices.items()}
    if overrides:
        few["per_layer_config"] = {place[n]: v for n, v in overrides.items() if n in place}
    return section | few


def _layers_of_every_kind(kinds: list[tuple[Any, ...]], wanted: int) -> list[int]:
    """The first layer of each kind, then the earliest others."""
    seen: dict[str, int] = {}
    for layer, kind in enumerate(kinds):
        seen.setdefault(repr(kind), layer)
    first = list(seen.values())[:wanted]
    others = [layer for layer in range(len(kinds)) if layer not in first]
    return sorted(first + others[: wanted - len(first)])
