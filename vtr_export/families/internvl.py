"""InternVL: an image is tiles of one size and a thumbnail; a shuffle makes one token of several."""

from vtr_export.families.decoders import read_decoder
from vtr_export.families.facts import ModelFacts, VisionFacts
from vtr_export.families.section import Config, Section, image_token, section_of


def internvl(config: Config, where: str) -> ModelFacts:
    """How many tiles an image becomes depends on its shape: no fixed number of tokens."""
    decoder, top = read_decoder(config, "qwen2", where), Section(config, "", where)
    merge = _merge(top)
    tower = _tower(config, where, merge)
    wide = tower.hidden * merge**2
    macs = (wide + decoder.hidden) * decoder.hidden
    return ModelFacts(
        model_type="internvl",
        **vars(decoder),
        tokens_per_image=None,
        image_token_id=image_token(config, 151667, where),
        vision=tower,
        projector_parameters=macs + 2 * decoder.hidden + 2 * wide,
        projector_macs=macs,
    )


def _merge(top: Section) -> int:
    """``downsample_ratio`` 1/m: m by m features become one token."""
    ratio = top.values.get("downsample_ratio", 0.5)
    if type(ratio) not in (int, float) or not 0 < ratio <= 1 or (1 / ratio) % 1:
        raise top.error(f"downsample_ratio is {ratio!r}, not 1 divided by a whole number")
    merge: int = round(1 / ratio)
    return merge


def _tower(config: Config, where: str, merge: int) -> VisionFacts:
    """CLS, learned positions, scaled residuals; queries and keys are normed on request."""
    _, vision = section_of(config, "vision_config", "internvl_vision", where)
    width, inner = vision.size("hidden_size"), vision.size("intermediate_size")
    image, patch = vision.side("image_size"), vision.side("patch_size")
    layers, channels = vision.size("num_hidden_layers"), vision.size("num_channels")
    run, normed = _layers_run(config, layers, where)
    side = image // patch
    if side % merge:
        raise vision.error(f"image_size {image} has {side} patches a side, no multiple of {merge}")
    positions = side**2 + 1 if vision.values.get("use_absolute_position_embeddings", True) else 0
    embedding = width * (channels * patch**2 + 2 + positions)
    last = 0 if not normed or vision.flag("use_mean_pooling", True) else 2 * width
    return VisionFacts(
        layers=layers,
        layers_run=run,
        hidden=width,
        heads=vision.size("num_attention_heads"),
        intermediate=inner,
        tokens=side**2 + 1,
        image_size=image,
        patch_size=patch,
        channels=channels,
        has_cls=True,
        parameters=embedding + run * _layer(vision, width, inner) + last,
        merge=merge,
    )


def _layer(vision: Section, width: int, inner: int) -> int:
    """Parameters of one layer."""
    kind = vision.values.get("norm_type", "layer_norm")
    if kind not in ("layer_norm", "rms_norm"):
        raise vision.error(f"norm_type {kind!r} is neither 'layer_norm' nor 'rms_norm'")
    norms = (4 if kind == "layer_norm" else 2) * width
    attention = 4 * width**2 + (4 if vision.flag("attention_bias", False) else 1) * width
    qk_norms = 2 * width if vision.flag("use_qk_norm", False) else 0
    mlp = 2 * width * inner + inner + width
    return norms + attention + qk_norms + mlp + 2 * width


def _layers_run(config: Config, layers: int, where: str) -> tuple[int, bool]:
    """How many layers feed the projector, and whether the tower's last norm does, too."""
    given, top = config.get("vision_feature_layer", -1), Section(config, "", where)
    if type(given) is not int or not -layers - 1 <= given <= layers:
        raise top.error(f"vision_feature_layer {given!r} does not fit a tower of {layers} layers")
    if config.get("vision_feature_select_strategy", "default") != "default":
        raise top.error(
            "vision_feature_select_strategy is not 'default': with its CLS row a tile is no square"
        )
    return (given if given >= 0 else layers + 1 + given), given == -1
