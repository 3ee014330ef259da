"""A checkpoint's model by transformers, whatever the checkpoint's layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtr_export import models
from vtr_export.inner_decoder import point_at_layers
from vtr_export.reference import internvl_chat
from vtr_export.trained import PREFIX


def load_model(
    weights: Path, config: Path, dtype: torch.dtype, *, trusted: bool = False, **options: Any
) -> Any:
    """The model of ``weights`` (a folder) as ``config`` (a folder with transformers') describes it.

    In eval mode. OpenGVLab's own layout is read and taken apart here, by its definition.
    ``trusted``: by the code that ``weights`` brings, where it does.
    """
    from transformers import AutoConfig, InternVLForConditionalGeneration

    models.register()
    options |= {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    settings = AutoConfig.from_pretrained(config, local_files_only=True, trust_remote_code=trusted)
    own = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    if own.get("model_type") != "internvl_chat":
        load = _auto_class(settings if trusted else None).from_pretrained
        options["trust_remote_code"] = trusted
        if own.get("architectures") == ["ShieldGemma2ForImageClassification"]:
            load = _load_held
        model = _with_norm(load(weights, config=settings, **options).eval())
        return with_held(model, _held(weights, dtype))
    model = InternVLForConditionalGeneration.from_pretrained(
        None, config=settings, state_dict=internvl_chat.weights(weights, own), **options
    )
    return internvl_chat.shuffled(model, str(own.get("ps_version", "v1"))).eval()


def _held(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of a checkpoint that only reductions read, by name."""
    from safetensors import safe_open

    found = dict[str, Tensor]()
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118 -- no dict
            found |= {name: file.get_tensor(name).to(dtype) for name in names}
    return found


def with_held(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """``model`` with parameters beside its own, under their dotted names."""
    for name, weight in weights.items():
        *path, last = name.split(".")
        module = model
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(weight, requires_grad=False))
    return model


def _load_held(weights: Path, **options: Any) -> Any:
    """The generator inside a classifier."""
    from transformers import ShieldGemma2ForImageClassification

    return ShieldGemma2ForImageClassification.from_pretrained(weights, **options).model


def _auto_class(settings: Any) -> Any:
    """Of the class that ``settings`` replace by their own; the usual one where they do not."""
    import transformers

    own = getattr(settings, "auto_map", None) or {}
    models = [name for name in own if name.startswith("AutoModel")]
    usual = "AutoModelForImageTextToText"
    return getattr(transformers, usual if usual in models or not models else models[0])


def _with_norm(model: Any) -> Any:
    """The decoder's last norm, and the token of its images, under the names that most have."""
    point_at_layers(model)
    decoder = model.get_decoder()
    for name in ("final_layernorm", "final_layer_norm", "layer_norm"):
        if not hasattr(decoder, "norm") and hasattr(decoder, name):
            decoder.norm = getattr(decoder, name)
    if not hasattr(model.config, "image_token_id") and hasattr(model.config, "video_token_id"):
        model.config.image_token_id = model.config.video_token_id
    if model.config.model_type == "idefics" and not hasattr(model.config, "image_token_id"):
        words = model.config.vocab_size + model.config.additional_vocab_size
        model.config.image_token_id = words - 1
    if model.config.model_type == "kosmos-2":
        _follow(model, decoder)
    return model


def _follow(model: Any, decoder: Any) -> None:
    """A decoder that takes a whole mask as it is; the first id behind the words is an image's."""
    own = decoder._prepare_decoder_attention_mask
    decoder._prepare_decoder_attention_mask = lambda mask, *sizes: (
        mask if mask is not None and mask.ndim == 4 else own(mask, *sizes)
    )
    model.config.image_token_id = model.config.text_config.vocab_size
