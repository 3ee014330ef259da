"""LLaVA-1.5: CLIP or SigLIP tower, two-layer projector, LLaMA-like decoder."""

from vtr_export.families.decoders import read_decoder
from vtr_export.families.facts import ModelFacts
from vtr_export.families.section import Config, Section, defaults, filled, image_token
from vtr_export.families.towers import dropped_tokens, read_tower


def llava(config: Config, where: str) -> ModelFacts:
    """``tokens_per_image`` are one image's, or one tile's: the tower takes one size."""
    config = filled(config)
    kind = config["model_type"]
    fallback = defaults()[kind]["sub_configs"]["text_config"]
    decoder, (vision, features) = read_decoder(config, fallback, where), read_tower(config, where)
    biases = Section(config, "", where).flag("multimodal_projector_bias", True)
    macs = (vision.hidden * features + decoder.hidden) * decoder.hidden
    return ModelFacts(
        model_type=kind,
        **vars(decoder),
        tokens_per_image=_tokens(config, vision.tokens, where),
        image_token_id=image_token(config, 32000, where),
        vision=vision,
        projector_parameters=macs + (2 * decoder.hidden if biases else 0),
        projector_macs=macs,
    )


def _tokens(config: Config, tokens: int | None, where: str) -> int | None:
    dropped = dropped_tokens(config, where)
    if tokens is not None:
        return tokens - dropped
    if dropped:
        message = "vision_feature_select_strategy 'default' drops a patch of images of any size"
        raise Section(config, "", where).error(message, 'it is "full" for Pixtral\'s tower')
    return None
