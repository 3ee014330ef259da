"""Aya Vision: an image is tiles of one size; a shuffle makes one token of several features."""

from vtr_export.families.decoders import read_decoder
from vtr_export.families.facts import ModelFacts
from vtr_export.families.section import Config, Section, filled, image_token
from vtr_export.families.towers import dropped_tokens, read_tower


def aya_vision(config: Config, where: str) -> ModelFacts:
    """SigLIP, a norm and a gated layer that halves its width, and a Cohere 2."""
    config = filled(config)
    top, decoder = Section(config, "", where), read_decoder(config, "cohere2", where)
    merge = top.size("downsample_factor")
    tower, features = read_tower(config, where, "siglip_vision_model", merge=merge)
    if features > 1 or dropped_tokens(config, where) or tower.has_cls:
        raise top.error("its features are not one layer's of a SigLIP: a tile is no square")
    assert tower.image_size is not None, "of one size"
    if (side := tower.image_size // tower.patch_size) % merge:
        raise top.error(f"downsample_factor {merge} does not divide {side} patches a side")
    wide = tower.hidden * merge**2
    inner = top.number("alignment_intermediate_size") or decoder.hidden
    macs = wide * inner + inner // 2 * decoder.hidden
    return ModelFacts(
        model_type="aya_vision",
        **vars(decoder),
        tokens_per_image=None,
        image_token_id=image_token(config, 255036, where),
        vision=tower,
        projector_parameters=macs + inner + decoder.hidden + 2 * wide,
        projector_macs=macs,
    )
