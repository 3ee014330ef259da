"""Gemma 3 and PaliGemma: a whole SigLIP tower, and attention that is not all causal."""

from dataclasses import replace

from vtr_export.families.decoders import read_decoder
from vtr_export.families.facts import ModelFacts, VisionFacts
from vtr_export.families.section import Config, Section, filled, image_token
from vtr_export.families.towers import read_tower


def gemma3(config: Config, where: str) -> ModelFacts:
    """Features are pooled, normed and multiplied; the tokens of an image see each other."""
    config = filled(config)
    decoder, tower = read_decoder(config, "gemma3_text", where), _tower(config, where)
    macs = tower.hidden * decoder.hidden
    top = Section(config, "", where)
    tokens = top.size("mm_tokens_per_image")
    patches, side = _side(tower), int(tokens**0.5)
    if side**2 != tokens or patches % side:
        raise top.error(
            f"mm_tokens_per_image {tokens} is no pool of {patches} by {patches} patches"
        )
    return ModelFacts(
        model_type=config["model_type"],
        **vars(decoder),
        tokens_per_image=tokens,
        image_token_id=image_token(config, 262144, where),
        vision=replace(tower, merge=patches // side),
        projector_parameters=macs + tower.hidden,
        projector_macs=macs,
        attends="images",
    )


def paligemma(config: Config, where: str) -> ModelFacts:
    """One linear layer; all tokens of a prompt see each other, and positions start at 1."""
    config = filled(config)
    decoder = read_decoder(config, "gemma", where, prefix=True)
    tower, top = _tower(config, where), Section(config, "", where)
    if (width := top.size("projection_dim")) != decoder.hidden:
        raise top.error(f"projection_dim {width} is not text_config.hidden_size {decoder.hidden}")
    macs = tower.hidden * width
    return ModelFacts(
        model_type="paligemma",
        **vars(decoder),
        tokens_per_image=_side(tower) ** 2,
        image_token_id=image_token(config, 256000, where),
        vision=tower,
        projector_parameters=macs + width,
        projector_macs=macs,
        attends="prompt",
        first_position=1,
    )


def _tower(config: Config, where: str) -> VisionFacts:
    """All its layers and the norm behind them."""
    vision = {"model_type": "siglip_vision_model", **(config.get("vision_config") or {})}
    tower, _ = read_tower({"vision_config": vision, "vision_feature_layer": -1}, where)
    return replace(tower, parameters=tower.parameters + 2 * tower.hidden)


def _side(tower: VisionFacts) -> int:
    """Patches of a side."""
    assert tower.image_size is not None, "of one size"
    return tower.image_size // tower.patch_size
