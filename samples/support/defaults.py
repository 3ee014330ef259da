"""What a config.json leaves unsaid: transformers' defaults of the fields that facts are made of.

python samples/support/defaults.py writes vtr_export/families/defaults.json (or the file given).
"""

import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

DEFAULTS = Path(__file__).resolve().parents[2] / "vtr_export" / "families" / "defaults.json"
Json = dict[str, Any]
TOWERS = (  # what checkpoints name in a vision_config that any class may fill, and BLIP-2's T5
    "clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "pixtral", "dinov2",
    "dinov2_with_registers", "dinov3_vit", "intern_vit", "internvl_vision", "vit", "deit", "beit",
    "swin", "blip_vision_model", "aimv2_vision_model", "mlcd_vision_model",
    "metaclip_2_vision_model", "sam_vision_model", "timm_wrapper", "t5", "mt5", "bart", "mbart",
)  # fmt: skip
FIELD = re.compile(
    r"tie_word_embeddings|\w*vocab_size\w*|is_causal"
    r"|(\w+_)?hidden_sizes?|hidden_dim|d_model|d_kv|d_ff|(\w+_)?ffn_dim|mlp_dim|mlp_ratio|embed_dim"
    r"|\w*intermediate_size\w*|(\w+_)?embed_proj_dim|n_embd|n_inner|n_positions|n_head|n_layers?"
    r"|(\w+_)?num_(\w+_)?(heads|layers|blocks|channels)|(\w+_)?(layers|heads|depths?|head_dim|head_size)"
    r"|(\w+_)?num_key_value_heads|num_kv_heads|n_head_kv|multi_query|(\w+_)?lora_rank"
    r"|max_position_embeddings|max_sequence_length|max_seq_len|\w*sliding_window\w*"
    r"|attention_chunk_size|max_window_layers|attn_temperature_tuning|floor_scale"
    r"|\w*layer_types|layers_block_type|block_types|per_layer_config|\w*layer\w*_(indexes|indices|ids)"
    r"|\w*_attn_(indexes|idxs)|fullatt_block_indexes|no_rope_layer\w*|moe_layers|cross_attention_\w+"
    r"|cross_layer_interval|kv_source_layers|num_kv_shared_layers|attn_layer_(period|offset)"
    r"|rope_\w+|partial_rotary_factor|rotary_\w+|default_theta|mrope\w*|position_embedding_type|alibi"
    r"|(\w+_)?bias|use_qk_norm|qk_norm\w*|qk_layernorm|use_\w*norm|\w*softcap\w*|query_pre_attn_scalar"
    r"|attention_multiplier|\w*_multiplier|logits?_scal\w+|scale_emb\w*|embedding_scale|scale_embedding"
    r"|\w*hidden_act\w*|activation_function|\w*_activation|layer_norm_eps\w*|rms_norm_eps|norm_eps|norm_epsilon"
    r"|(image|video|audio|im|img)_(token|patch|context_token|newline|placeholder_token)_(id|index)"
    r"|(vision|image|video|boi|eoi|im)(_start|_end|_bos|_eos)?_token_(id|index)|im_(start|end|newline)_id"
    r"|(\w+_)?image_size|patch_sizes?|\w*patch_size|\w*merge_size|merge_kernel_size|\w*in_channels|in_chans"
    r"|num_position_embeddings|resampler_n_latents|vision_feature_\w+|spatial_\w+|deepstack_\w+|downsample_\w+|pixel_shuffle\w*|scale_factor|window_size"
    r"|image_seq_len\w*|num_image_tokens|mm_tokens_per_image|num_query_tokens|tokens_per_second|\w*grid_pinpoints"
    r"|vision_aspect_ratio|pooling_kernel_size|\w*projection_dim|out_hidden_size|\w*pool\w*"
    r"|\w*num_\w*experts\w*|n_(routed|shared)_experts|moe_\w+|first_k_dense_replace|decoder_sparse_step"
    r"|interleave_moe_layer_step|mlp_only_layers|n_group|topk_group|top_k_experts|expand|\w*conv_kernel\w*"
    r"|linear_\w+|ssm_\w+|mamba_\w+|use_bidirectional_attention|attn_implementation|index_\w+|indexer_\w+"
    r"|parallel_attn|new_decoder_architecture|use_parallel_residual|shared_\w+|do_pooling|architecture|model_args"
)  # fmt: skip
NOISE = re.compile(r"\w*(dropout|initializ|router_aux|jitter|loss)\w*|use_cache|audio_\w+")
DEPTHS = (12, 19, 32)  # layers at which a rule for lists is seen to hold


def defaults() -> Json:
    """The whole file: classes by architecture, and fields by the model_type of a section."""
    kinds, waiting = {}, [*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *_decoders(), *TOWERS]
    while waiting:
        name = waiting.pop()
        if name in kinds or name not in CONFIG_MAPPING:
            continue
        kinds[name] = CONFIG_MAPPING[name]
        waiting += [spec.model_type for spec in kinds[name].sub_configs_defaults.values()]
    return {
        "architectures": dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        "types": {name: fields(kind) for name, kind in kinds.items()},
    }


def _decoders() -> Iterable[str]:
    """Language models that a text_config can name."""
    return (name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not name.endswith("_assistant"))


def fields(kind: type[PretrainedConfig]) -> Json:
    """What the class says when nothing is given; ``derived`` is what it makes of that."""
    said = {field.name: _value(field) for field in dataclasses.fields(kind) if _counts(field.name)}
    specs = kind.sub_configs_defaults
    parts = {
        "sub_configs": {name: spec.model_type for name, spec in specs.items()},
        "fixed": sorted(n for n, spec in specs.items() if hasattr(spec.config_class, "model_type")),
        "absent": {n: _some(spec.init_kwargs) for n, spec in specs.items() if spec.init_kwargs},
        "optional": sorted(name for name, spec in specs.items() if spec.optional),
        "aliases": {a: f for a, f in kind.attribute_map.items() if f in said},
        "tied_by_text": _tied_by_text(kind),
        **_derived(kind, said),
    }
    own = {name: value for name, value in said.items() if name not in specs}
    if any(
        field.name == "is_encoder_decoder" and field.default for field in dataclasses.fields(kind)
    ):
        own["is_encoder_decoder"] = True
    return own | {name: value for name, value in parts.items() if value}


def _tied_by_text(kind: type[PretrainedConfig]) -> bool:
    """Whether the class takes its decoder's flag for its own."""
    if "text_config" not in kind.sub_configs_defaults:
        return False
    made = _made(kind, text_config={"tie_word_embeddings": True}, tie_word_embeddings=False)
    return made is not None and bool(made.get("tie_word_embeddings"))


def _counts(name: str) -> bool:
    return bool(FIELD.fullmatch(name)) and not NOISE.fullmatch(name)


def _some(values: Mapping[str, Any]) -> Json:
    return {name: value for name, value in values.items() if _counts(name)}


def _value(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return _plain(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _plain(field.default_factory())
    return None


def _plain(value: Any) -> Any:
    """As JSON holds it: tuples are lists."""
    return json.loads(json.dumps(value))


def _derived(kind: type[PretrainedConfig], said: Json) -> Json:
    """Fields that the class works out (a rule, a formula, a constant); others are only named."""
    whole, found, unknown = _made(kind), {}, []
    assert whole is not None
    for name in sorted(name for name in whole if _counts(name)):
        value = whole[name]
        if value is None or value == said.get(name) or name in kind.sub_configs_defaults:
            continue
        if isinstance(value, list) and len(value) == whole.get("num_hidden_layers"):
            rule = _pattern(kind, name, value)
        else:
            rule = _formula(kind, name, value)
        if rule is None:
            unknown.append(name)
        else:
            found[name] = rule
    return {"derived": found, "computed": unknown}


def _made(kind: type[PretrainedConfig], **values: Any) -> Json | None:
    """All that a configuration of this class holds; None where it refuses ``values``."""
    try:
        return json.loads(json.dumps(kind(**values).to_dict(), default=str))
    except Exception:  # each class refuses in its own way
        return None


FORMULAS = {
    "num_attention_heads": lambda c: c["num_attention_heads"],
    "hidden_size": lambda c: c["hidden_size"],
    "hidden_size // num_attention_heads": lambda c: c["hidden_size"] // c["num_attention_heads"],
    "4 * hidden_size": lambda c: 4 * c["hidden_size"],
    "int(mlp_ratio * hidden_size)": lambda c: int(c["mlp_ratio"] * c["hidden_size"]),
    "qk_rope_head_dim": lambda c: c["qk_rope_head_dim"],
    "qk_nope_head_dim + qk_rope_head_dim": lambda c: c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
}
SIZES = (
    {"num_attention_heads": 3, "hidden_size": 96},
    {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 12},
    {"num_attention_heads": 6},
    {"qk_rope_head_dim": 20},
    {"num_hidden_layers": 9},
)


def _formula(kind: type[PretrainedConfig], name: str, value: Any) -> Any:
    """The formula that gives ``value``, and gives it in other sizes too; or it, where it stays."""
    tried = [made for sizes in ({}, *SIZES) if (made := _made(kind, **sizes)) is not None]
    for text, formula in FORMULAS.items():
        try:
            if len(tried) > 1 and all(made[name] == formula(made) for made in tried):
                return text
        except (KeyError, TypeError, ZeroDivisionError):
            continue
    return value if all(made[name] == value for made in tried) else None


def _pattern(kind: type[PretrainedConfig], name: str, value: list[Any]) -> Json | None:
    """``{"first": …, "every": …, "last": …}``: a start, a period from there on, an end over it."""
    lists = [value]
    for depth in DEPTHS:
        made = _made(kind, num_hidden_layers=depth)
        if made is not None and len(made[name]) == depth:
            lists.append(made[name])
    sizes = [(f, p, e) for p in range(1, 9) for f in range(5) for e in range(3)]
    for first, period, last in sorted(sizes, key=lambda s: (sum(s), s)):
        rule = {
            "first": value[:first],
            "every": value[first : first + period],
            "last": value[len(value) - last :],
        }
        if all(unroll(rule, len(one)) == one for one in lists):
            return {name: part for name, part in rule.items() if part}
    return None


def unroll(rule: Mapping[str, list[Any]], depth: int) -> list[Any]:
    """The list of ``depth`` layers that a rule stands for."""
    first, last = rule.get("first", []), rule.get("last", [])
    found = [*first, *islice(cycle(rule["every"]), max(depth - len(first), 0))][:depth]
    return [*found[: depth - len(last)], *last]


def text() -> str:
    """The file as it is stored: one line a type."""
    transformers.logging.set_verbosity_error()  # what the classes think of odd sizes
    found = defaults()
    lines = [
        f"  {json.dumps(name)}: {json.dumps(found['types'][name], sort_keys=True)}"
        for name in sorted(found["types"])
    ]
    classes = json.dumps(found["architectures"], sort_keys=True, indent=1)
    return f'{{"architectures": {classes},\n"types": {{\n' + ",\n".join(lines) + "\n}}\n"


if __name__ == "__main__":
    path = Path(sys.argv[1]) if sys.argv[1:] else DEFAULTS
    path.write_text(text(), encoding="utf-8")
