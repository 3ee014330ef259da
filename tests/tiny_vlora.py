"""A tiny random VLoRA checkpoint, with the image processor and the tokenizer it is prepared by."""

from pathlib import Path
from typing import Any

import tiny_models
from tiny_llavas import CLIP_SIZES, TEXT, vision_sizes
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig

from vtr_export.models import VLoRAConfig, VLoRAForConditionalGeneration

GENERATOR = {"vlora_dim": 16, "vlora_depth": 2, "vlora_heads": 2, "vlora_rank": 4, "vlora_alpha": 6}


def tiny_vlora(seed: int = 0, **changes: Any) -> VLoRAForConditionalGeneration:
    """Two of four layers are changed."""
    config = VLoRAConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(projection_dim=16, **vision_sizes()),
        **{**GENERATOR, "skip_layers": 2, **changes},
    )
    config._attn_implementation = "eager"
    model = VLoRAForConditionalGeneration(config)
    tiny_models.randomize(model, seed)
    return model.eval()


def save(folder: Path, seed: int = 0) -> VLoRAForConditionalGeneration:
    model = tiny_vlora(seed)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(**CLIP_SIZES).save_pretrained(folder)
    tokenizer = tiny_models.tiny_tokenizer()
    tokenizer.chat_template = tiny_models.CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return model
