"""LLaVA-1.5: CLIP or SigLIP tower, two-layer projector, LLaMA-like decoder."""

from typing import Final

from vtr_export.families.decoders import read_decoder
from vtr_export.families.facts import ModelFacts
from vtr_export.families.section import Config, Section, image_token
from vtr_export.families.towers import dropped_tokens, read_tower

TOWER: Final = {  # what transformers builds when vision_config is absent
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def llava(config: Config, where: str) -> ModelFacts:
    """``tokens_per_image`` are one image's, which has one size."""
    config = {**config, "vision_config": config.get("vision_config") or TOWER}
    decoder, (vision, features) = read_decoder(config, "llama", where), read_tower(config, where)
    biases = Section(config, "", where).flag("multimodal_projector_bias", True)
    macs = (vision.hidden * features + decoder.hidden) * decoder.hidden
    assert vision.tokens is not None, "of one size"
    return ModelFacts(
        model_type="llava",
        **vars(decoder),
        tokens_per_image=vision.tokens - dropped_tokens(config, where),
        image_token_id=image_token(config, 32000, where),
        vision=vision,
        projector_parameters=macs + (2 * decoder.hidden if biases else 0),
        projector_macs=macs,
    )
