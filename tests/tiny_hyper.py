"""A tiny random mPLUG-Owl3 checkpoint, with the image processor and the tokenizer of its images."""

from pathlib import Path

import tiny_models
from tiny_llavas import TEXT, TILE, vision_sizes
from transformers import Qwen2Config, SiglipImageProcessorPil, SiglipVisionConfig

from vtr_export.models import MPlugOwl3Config, MPlugOwl3ForConditionalGeneration

LAYERS = (1, 3)  # counted from 1, of four


def tiny_owl(seed: int = 0) -> MPlugOwl3ForConditionalGeneration:
    config = MPlugOwl3Config(
        text_config=Qwen2Config(**TEXT),
        vision_config=SiglipVisionConfig(vision_use_head=False, **vision_sizes()),
        hyper_layers=list(LAYERS),
        image_token_id=tiny_models.IMAGE,
    )
    config._attn_implementation = "eager"
    model = MPlugOwl3ForConditionalGeneration(config)
    tiny_models.randomize(model, seed)
    return model.eval()


def save(folder: Path, seed: int = 0) -> MPlugOwl3ForConditionalGeneration:
    model = tiny_owl(seed)
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": TILE, "width": TILE}).save_pretrained(folder)
    tokenizer = tiny_models.tiny_tokenizer()
    tokenizer.chat_template = tiny_models.CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return model
