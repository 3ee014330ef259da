"""OpenGVLab's ``internvl_chat``: its configuration as transformers' ``internvl``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vtr_export.errors import CheckpointError
from vtr_export.layouts.internvl_prompt import end_token
from vtr_export.layouts.tokens import IMAGE, token_ids

Config = Mapping[str, Any]
FRESH: Final = "check it against a fresh download of the model"
# what OpenGVLab's configuration classes say where the file is silent
TOP: Final[Config] = {
    "select_layer": -1,
    "downsample_ratio": 0.5,
    "ps_version": "v1",
    "pad2square": False,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}
VISION: Final[Config] = {
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 224,
    "qkv_bias": False,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "qk_normalization": True,
    "num_hidden_layers": 48,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
}
INTERNLM2: Final[Config] = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bias": True,
    "rope_theta": 10000,
}
DECODERS: Final[Mapping[str, str]] = {  # architecture → the model type that computes the same
    "InternLM2ForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_TEXT: Final = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip


def top(config: Config) -> dict[str, Any]:
    """The configuration over what its class says where it is silent."""
    return {**TOP, **{name: value for name, value in config.items() if value is not None}}


def convert(config: Config, folder: Path) -> dict[str, Any]:
    """The same model for transformers; CheckpointError for what transformers could not compute.

    ``ps_version`` goes along: transformers' own model knows v2 alone. The image token's id is the
    tokenizer's.
    """
    full, where = top(config), str(folder / "config.json")
    _refuse(full, where)
    vision, text = _vision(full, where), _text(full, where)
    if (end := end_token(config, folder)) is not None:
        text["eos_token_id"] = end  # what answers end with; generation_config.json may say more
    ratio, side = full["downsample_ratio"], vision["image_size"] // vision["patch_size"]
    return {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": ratio,
        "image_seq_length": round((side * ratio) ** 2),
        "image_token_id": _image_token(folder),
        "ps_version": full["ps_version"],
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "vision_config": vision,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        **{name: full[name] for name in ("dtype", "torch_dtype") if name in full},
    }


def _image_token(folder: Path) -> int:
    if (found := token_ids(folder).get(IMAGE)) is None:
        raise CheckpointError(
            f"no file says which id {IMAGE} has",
            where=str(folder),
            hint="put the checkpoint's tokenizer_config.json or added_tokens.json there",
        )
    return found


def _refuse(full: Config, where: str) -> None:
    """What a model of ours would silently leave out."""
    for name, does in (
        ("use_backbone_lora", "its tower has adapters beside the weights"),
        ("use_llm_lora", "its decoder has adapters beside the weights"),
        ("image_fold", "it folds images into parts"),
    ):
        if full.get(name):
            raise CheckpointError(
                f"{name} is {full[name]!r}: {does}, which is not supported",
                where=where,
                hint="merge the adapters, or export a checkpoint without this setting",
            )
    if full["dynamic_image_size"] and not full["use_thumbnail"]:
        raise CheckpointError(
            "use_thumbnail is false: tiles without the image as a whole are not supported",
            where=where,
            hint="export a checkpoint that was trained with thumbnails",
        )
    if full["ps_version"] not in ("v1", "v2"):
        raise CheckpointError(
            f"ps_version {full['ps_version']!r} is neither 'v1' nor 'v2'", where=where, hint=FRESH
        )


def _vision(full: Config, where: str) -> dict[str, Any]:
    """The tower, without the layers behind the selected one."""
    vision = {**VISION, **_section(full, "vision_config", where)}
    size = full.get("force_image_size") or vision["image_size"]
    if size != vision["image_size"]:
        raise CheckpointError(
            f"force_image_size is {size}, the tower's positions are for {vision['image_size']}",
            where=where,
            hint="export a checkpoint whose positions were resized when it was saved",
        )
    layers, selected = vision["num_hidden_layers"], full["select_layer"]
    if type(selected) is not int or not -layers - 1 <= selected <= layers:
        raise CheckpointError(
            f"select_layer {selected!r} does not fit a tower of {layers} layers",
            where=where,
            hint=FRESH,
        )
    same = ("num_channels", "patch_size", "image_size", "hidden_size", "num_attention_heads",
            "intermediate_size", "hidden_act", "norm_type", "layer_norm_eps")  # fmt: skip
    return {
        "model_type": "internvl_vision",
        **{name: vision[name] for name in same},
        "num_hidden_layers": selected if selected >= 0 else layers + 1 + selected,
        "attention_bias": vision["qkv_bias"],
        "use_qk_norm": vision["qk_normalization"],
        "use_mean_pooling": True,  # no norm behind the last layer
    }


def _text(full: Config, where: str) -> dict[str, Any]:
    """The decoder; InternLM2 is LLaMA with fused projections."""
    own = _section(full, "llm_config", where)
    architecture = (own.get("architectures") or ["LlamaForCausalLM"])[0]
    if architecture not in DECODERS:
        raise CheckpointError(
            f"llm_config is a {architecture}, which is not supported in this layout",
            where=where,
            hint=f"supported: {', '.join(DECODERS)}",
        )
    if architecture == "InternLM2ForCausalLM":
        own = {**INTERNLM2, **own}
        own["attention_bias"] = own["bias"]
    text = {name: own[name] for name in _TEXT if own.get(name) is not None}
    if (window := own.get("sliding_window", ...)) is None:
        text["sliding_window"] = window
    return {"model_type": DECODERS[architecture], **text}


def _section(full: Config, name: str, where: str) -> dict[str, Any]:
    value = full.get(name)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"there is no {name}", where=where, hint=FRESH)
    return {key: item for key, item in value.items() if item is not None or "window" in key}
