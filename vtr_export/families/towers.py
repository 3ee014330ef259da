"""Vision towers' facts."""

from typing import Final

from vtr_export.errors import CheckpointError
from vtr_export.families.facts import VisionFacts
from vtr_export.families.section import FRESH, Config, Section, section_of

TOWERS: Final = ("clip_vision_model", "siglip_vision_model")


def read_tower(config: Config, where: str) -> tuple[VisionFacts, int]:
    """A CLIP or SigLIP tower, and how many of its layers feed the projector."""
    kind, vision = section_of(config, "vision_config", TOWERS[0], where)
    if kind not in TOWERS:
        raise CheckpointError(
            f"vision_config.model_type {kind!r} is not supported",
            where=where,
            hint=f"supported: {', '.join(TOWERS)}",
        )
    features = _feature_layers(config, vision.size("num_hidden_layers"), where)
    return _tower(vision, kind == TOWERS[0], max(features)), len(features)


def dropped_tokens(config: Config, where: str) -> int:
    """``default`` drops the first row of any tower, CLS or not; ``full`` drops none."""
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise CheckpointError(
            f"vision_feature_select_strategy {strategy!r} is neither 'default' nor 'full'",
            where=where,
            hint=FRESH,
        )
    return 1 if strategy == "default" else 0


def _feature_layers(config: Config, layers: int, where: str) -> tuple[int, ...]:
    """How many tower layers run before each feature that the projector reads."""
    given = config.get("vision_feature_layer", -2)
    wanted = given if isinstance(given, list) and given else [given]
    if any(isinstance(i, bool) or not isinstance(i, int) or not -layers - 1 <= i <= layers
           for i in wanted):  # fmt: skip
        raise CheckpointError(
            f"vision_feature_layer {given!r} does not fit a tower of {layers} layers",
            where=where,
            hint=FRESH,
        )
    return tuple(i if i >= 0 else layers + 1 + i for i in wanted)


def _tower(vision: Section, has_cls: bool, layers_run: int) -> VisionFacts:
    """CLIP (CLS token, norm before the layers) or SigLIP (biased patch embedding)."""
    hidden, intermediate = vision.size("hidden_size"), vision.size("intermediate_size")
    image, patch = vision.side("image_size"), vision.side("patch_size")
    channels = vision.size("num_channels")
    tokens = (image // patch) ** 2 + has_cls
    extras = hidden + 2 * hidden if has_cls else hidden  # class embedding and norm, or patch bias
    layer = 4 * (hidden + 1) * hidden + 2 * hidden * intermediate + intermediate + 5 * hidden
    return VisionFacts(
        layers=vision.size("num_hidden_layers"),
        layers_run=layers_run,
        hidden=hidden,
        heads=vision.size("num_attention_heads"),
        intermediate=intermediate,
        tokens=tokens,
        image_size=image,
        patch_size=patch,
        channels=channels,
        has_cls=has_cls,
        parameters=hidden * (channels * patch**2 + tokens) + extras + layers_run * layer,
    )
