"""mPLUG-Owl3: SigLIP, Qwen2 whose hyper layers see images as keys beside those of text."""

from vtr_export.families.decoders import read_decoder
from vtr_export.families.facts import ModelFacts
from vtr_export.families.section import Config, Section, image_token
from vtr_export.families.towers import read_tower

LAYERS = (1, 9, 17, 25)


def mplug_owl3(config: Config, where: str) -> ModelFacts:
    """An image has one token in the prompt, its place; its keys are no tokens."""
    own = Section(config, "", where)
    decoder = read_decoder(config, "qwen2", where)
    tower, _ = read_tower(config, where, "siglip_vision_model")
    hyper = config.get("hyper_layers", list(LAYERS))
    known = range(1, decoder.layers + 1)
    if not isinstance(hyper, list) or not hyper or any(layer not in known for layer in hyper):
        raise own.error(f"hyper_layers {hyper!r} do not fit {decoder.layers} layers")
    if tower.tokens is None or decoder.tied:
        raise own.error("vision_config has no one size, or the head is the embedding")
    width = 2 * decoder.kv_heads * decoder.head_dim
    return ModelFacts(
        model_type="mplug_owl3",
        **vars(decoder),
        tokens_per_image=0,
        image_token_id=image_token(config, 151646, where),
        vision=tower,
        projector_parameters=(tower.hidden + 1) * decoder.hidden
        + len(hyper) * (decoder.hidden + 1) * width,
        projector_macs=0,
        features="keys",
        feature_shape=(len(hyper) * width,),
    )
