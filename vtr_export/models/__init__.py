"""Models of the literature that transformers has not, written from their definitions."""

from transformers import AutoConfig, AutoModelForImageTextToText

from vtr_export.models.vlora import VLoRAConfig, VLoRAForConditionalGeneration

__all__ = ["VLoRAConfig", "VLoRAForConditionalGeneration", "register"]


def register() -> None:
    """Have transformers' auto classes know them."""
    AutoConfig.register(VLoRAConfig.model_type, VLoRAConfig, exist_ok=True)
    AutoModelForImageTextToText.register(VLoRAConfig, VLoRAForConditionalGeneration, exist_ok=True)
