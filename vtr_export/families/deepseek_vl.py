"""DeepSeek-VL and Janus: images of one size, all layers of a SigLIP and its last norm."""

from dataclasses import replace
from itertools import pairwise

from vtr_export.families.decoders import DecoderFacts, read_decoder
from vtr_export.families.facts import ModelFacts, VisionFacts
from vtr_export.families.section import Config, filled, image_token, section_of
from vtr_export.families.towers import read_tower, vit


def deepseek_vl(config: Config, where: str) -> ModelFacts:
    """Two layers project."""
    config, decoder = filled(config), read_decoder(config, "llama", where)
    whole = {**config, "vision_feature_layer": -1}
    tower, _ = read_tower(whole, where, "siglip_vision_model")
    tower = replace(tower, parameters=tower.parameters + 2 * tower.hidden)
    return _facts(config, where, decoder, tower, [tower.hidden, *[decoder.hidden] * 2])


def janus(config: Config, where: str) -> ModelFacts:
    """What understands images; what draws them (a VQ-VAE and its head) is not exported."""
    config, decoder = filled(config), read_decoder(config, "llama", where)
    _, vision = section_of(config, "vision_config", "janus_vision_model", where)
    tower = vit(
        vision,
        rest=3,
        inner=int(vision.size("hidden_size") * vision.values["mlp_ratio"]),
        biases=4 if vision.flag("attention_bias", True) else 1,
        norms=8 if vision.flag("use_qk_norm", False) else 4,
    )
    width = vision.size("projection_dim")
    if width != decoder.hidden:
        raise vision.error(f"projection_dim {width} is not the decoder's width {decoder.hidden}")
    return _facts(config, where, decoder, tower, [tower.hidden, *[width] * vision.size("depth")])


def _facts(
    config: Config, where: str, decoder: DecoderFacts, tower: VisionFacts, widths: list[int]
) -> ModelFacts:
    """``widths`` between the projector's layers, from the tower's to the decoder's."""
    macs = sum(a * b for a, b in pairwise(widths))
    return ModelFacts(
        model_type=config["model_type"],
        **vars(decoder),
        tokens_per_image=tower.tokens,
        image_token_id=image_token(config, config["image_token_id"], where),
        vision=tower,
        projector_parameters=macs + sum(widths[1:]),
        projector_macs=macs,
    )
