"""Mistral 3: images keep their size; patches see those of their image, and are merged."""

from vtr_export.families.decoders import read_decoder
from vtr_export.families.facts import ModelFacts
from vtr_export.families.section import Config, Section, filled, image_token
from vtr_export.families.towers import read_tower


def mistral3(config: Config, where: str) -> ModelFacts:
    """Pixtral's tower and a Mistral; the projector norms, merges and widens."""
    config = filled(config)
    top, decoder = Section(config, "", where), read_decoder(config, "mistral", where)
    merge = top.size("spatial_merge_size")
    tower, features = read_tower(config, where, "pixtral", merge=merge)
    if features > 1:
        raise top.error(f"vision_feature_layer selects {features} layers, its norm is for one")
    macs = (tower.hidden * merge) ** 2 + (tower.hidden + decoder.hidden) * decoder.hidden
    biases = 2 * decoder.hidden if top.flag("multimodal_projector_bias", False) else 0
    return ModelFacts(
        model_type="mistral3",
        **vars(decoder),
        tokens_per_image=None,
        image_token_id=image_token(config, 10, where),
        vision=tower,
        projector_parameters=macs + biases + tower.hidden,
        projector_macs=macs,
    )
