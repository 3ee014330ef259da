"""Idefics3 and SmolVLM: an image is cut into tiles; a shuffle makes one token of several."""

from vtr_export.families.decoders import read_decoder
from vtr_export.families.facts import ModelFacts, VisionFacts
from vtr_export.families.section import Config, Section, filled, image_token, section_of


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
    width, inner = vision.size("hidden_size"), vision.size("intermediate_size")
    image, patch = vision.side("image_size"), vision.side("patch_size")
    layers, channels = vision.size("num_hidden_layers"), vision.size("num_channels")
    side = image // patch
    if side % merge:
        raise vision.error(f"image_size {image} has {side} patches a side, no multiple of {merge}")
    layer = 4 * (width + 1) * width + 2 * width * inner + inner + 5 * width
    return VisionFacts(
        layers=layers,
        layers_run=layers,
        hidden=width,
        heads=vision.size("num_attention_heads"),
        intermediate=inner,
        tokens=side**2,
        image_size=image,
        patch_size=patch,
        channels=channels,
        has_cls=False,
        parameters=width * (channels * patch**2 + 1 + side**2) + layers * layer + 2 * width,
        merge=merge,
    )
