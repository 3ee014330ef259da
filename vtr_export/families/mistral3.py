"""Mistral 3 and LightOnOCR: images keep their size; patches see those of their image, and merge."""

from vtr_export.families.decoders import read_decoder
from vtr_export.families.facts import ModelFacts
from vtr_export.families.section import Config, Section, defaults, filled, image_token
from vtr_export.families.towers import read_tower


def mistral3(config: Config, where: str) -> ModelFacts:
    """Pixtral's tower and a Mistral; the projector norms, merges and widens."""
    config = filled(config)
    kind, top = config["model_type"], Section(config, "", where)
    decoder = read_decoder(config, defaults()[kind]["sub_configs"]["text_config"], where)
    merge = top.size("spatial_merge_size")
    tower, features = read_tower(config, where, "pixtral", merge=merge)
    if features > 1:
        raise top.error(f"vision_feature_layer selects {features} layers, its norm is for one")
    macs = (tower.hidden * merge) ** 2 + (tower.hidden + decoder.hidden) * decoder.hidden
    biases = 2 * decoder.hidden if top.flag("multimodal_projector_bias", False) else 0
    return ModelFacts(
        model_type=kind,
        **vars(decoder),
        tokens_per_image=None,
        image_token_id=image_token(config, 10, where),
        vision=tower,
        projector_parameters=macs + biases + tower.hidden,
        projector_macs=macs,
    )


def lighton_ocr(config: Config, where: str) -> ModelFacts:
    """The same of all layers and a Qwen3; its prompt has no breaks between rows."""
    return mistral3(
        {**config, "vision_feature_layer": -1, "multimodal_projector_bias": False}, where
    )
