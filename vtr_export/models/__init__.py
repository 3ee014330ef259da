"""Models of the literature that transformers has not, written from their definitions."""

from transformers import AutoConfig, AutoModelForImageTextToText

from vtr_export.models.mplug_owl3 import MPlugOwl3Config, MPlugOwl3ForConditionalGeneration
from vtr_export.models.vlora import VLoRAConfig, VLoRAForConditionalGeneration

__all__ = [
    "MPlugOwl3Config",
    "MPlugOwl3ForConditionalGeneration",
    "VLoRAConfig",
    "VLoRAForConditionalGeneration",
    "register",
]


def register() -> None:
    """Have transformers' auto classes know them."""
    for config, model in (
        (MPlugOwl3Config, MPlugOwl3ForConditionalGeneration),
        (VLoRAConfig, VLoRAForConditionalGeneration),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForImageTextToText.register(config, model, exist_ok=True)
