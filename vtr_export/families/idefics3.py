"""Idefics3 and SmolVLM: an image is cut into tiles; a shuffle makes one token of several."""

from dataclasses import replace

from vtr_export.families.decoders import read_decoder
from vtr_export.families.facts import ModelFacts, VisionFacts
from vtr_export.families.section import Config, Section, filled, image_token, section_of
from vtr_export.families.towers import vit


def idefics3(config: Config, where: str) -> ModelFacts:
    """How many tiles an image becomes depends on its shape: no fixed number of tokens."""
    config = filled(config)
    kind = config["model_type"]
    decoder, merge = (
        read_decoder(config, "llama", where),
        Section(config, "", where).size("scale_factor"),
    )
    tower = _tower(config, f"{kind}_vision", merge, where)
    macs = tower.hidden * merge**2 * decoder.hidden
    return ModelFacts(
        model_type=kind,
        **vars(decoder),
        tokens_per_image=None,
        image_token_id=image_token(config, 128257, where),
        vision=tower,
        projector_parameters=macs,
        projector_macs=macs,
    )


def _tower(config: Config, kind: str, merge: int, where: str) -> VisionFacts:
    """SigLIP's layers, learned positions, and a norm behind the last layer."""
    _, vision = section_of(config, "vision_config", kind, where)
    tower = vit(vision, rest=3)
    assert tower.image_size is not None, "of one size"
    if (side := tower.image_size // tower.patch_size) % merge:
        raise vision.error(
            f"image_size {tower.image_size} has {side} patches a side, no multiple of {merge}"
        )
    return replace(tower, merge=merge)
