"""A checkpoint's model by transformers, whatever the checkpoint's layout."""

import json
from pathlib import Path
from typing import Any

import torch

from vtr_export.reference import internvl_chat


def load_model(weights: Path, config: Path, dtype: torch.dtype, **options: Any) -> Any:
    """The model of ``weights`` (a folder) as ``config`` (a folder with transformers') describes it.

    In eval mode. OpenGVLab's own layout is read and taken apart here, by its definition.
    """
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
        InternVLForConditionalGeneration,
    )

    options |= {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    settings = AutoConfig.from_pretrained(config, local_files_only=True)
    own = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    if own.get("model_type") != "internvl_chat":
        load = AutoModelForImageTextToText.from_pretrained
        return _with_norm(load(weights, config=settings, **options).eval())
    model = InternVLForConditionalGeneration.from_pretrained(
        None, config=settings, state_dict=internvl_chat.weights(weights, own), **options
    )
    return internvl_chat.shuffled(model, str(own.get("ps_version", "v1"))).eval()


def _with_norm(model: Any) -> Any:
    """The decoder's last norm under the name that most decoders give it."""
    decoder = model.get_decoder()
    if not hasattr(decoder, "norm") and hasattr(decoder, "final_layernorm"):
        decoder.norm = decoder.final_layernorm
    return model
