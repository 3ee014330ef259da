"""Vision towers' facts."""

from dataclasses import replace
from typing import Final

from vtr_export.errors import CheckpointError
from vtr_export.families.facts import VisionFacts
from vtr_export.families.section import FRESH, Config, Section, section_of

ONE_SIZE: Final = ("clip_vision_model", "siglip_vision_model")
TOWERS: Final = (*ONE_SIZE, "pixtral")


def read_tower(
    config: Config, where: str, fallback: str = TOWERS[0], *, merge: int = 1
) -> tuple[VisionFacts, int]:
    """A tower and how many of its layers feed the projector; ``fallback``: see ``read_decoder``.

    The projector makes one token of ``merge`` by ``merge`` features.
    """
    kind, vision = section_of(config, "vision_config", fallback, where)
    if kind not in TOWERS:
        raise CheckpointError(
            f"vision_config.model_type {kind!r} is not supported",
            where=where,
            hint=f"supported: {', '.join(TOWERS)}",
        )
    features = _feature_layers(config, vision.size("num_hidden_layers"), where)
    build = _one_size if kind in ONE_SIZE else _pixtral
    return replace(build(vision, kind, max(features)), merge=merge, kind=kind), len(features)


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


def vit(
    vision: Section,
    *,
    rest: int,
    has_cls: bool = False,
    inner: int | None = None,
    biases: int = 4,
    norms: int = 4,
    layers_run: int | None = None,
) -> VisionFacts:
    """A square of learned positions; attention and MLP, a norm before each.

    In vectors of its width: ``biases`` of a layer's attention, ``norms`` of a layer, and ``rest``
    beside patches, positions and layers. ``inner`` None: the MLP is ``intermediate_size`` wide.
    """
    hidden, inner = vision.size("hidden_size"), inner or vision.size("intermediate_size")
    layers, heads = vision.size("num_hidden_layers"), vision.size("num_attention_heads")
    image, patch = vision.side("image_size"), vision.side("patch_size")
    channels = vision.number("num_channels") or 3
    run, tokens = layers if layers_run is None else layers_run, (image // patch) ** 2 + has_cls
    layer = (4 * hidden + biases + norms + 1) * hidden + 2 * hidden * inner + inner
    return VisionFacts(
        layers=layers,
        layers_run=run,
        hidden=hidden,
        heads=heads,
        intermediate=inner,
        tokens=tokens,
        image_size=image,
        patch_size=patch,
        channels=channels,
        has_cls=has_cls,
        parameters=hidden * (channels * patch**2 + tokens + rest) + run * layer,
    )


def _one_size(vision: Section, kind: str, layers_run: int) -> VisionFacts:
    """CLIP (CLS token, norm before the layers) or SigLIP (biased patch embedding)."""
    is_clip = kind == TOWERS[0]
    return vit(vision, rest=3 if is_clip else 1, has_cls=is_clip, layers_run=layers_run)


def _pixtral(vision: Section, _: str, layers_run: int) -> VisionFacts:
    """Images of any size, rotary positions, RMSNorms and gated MLPs; no biases."""
    hidden, intermediate = vision.size("hidden_size"), vision.size("intermediate_size")
    patch, channels = vision.side("patch_size"), vision.size("num_channels")
    layer = 4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden
    return VisionFacts(
        layers=vision.size("num_hidden_layers"),
        layers_run=layers_run,
        hidden=hidden,
        heads=vision.size("num_attention_heads"),
        intermediate=intermediate,
        tokens=None,
        image_size=None,
        patch_size=patch,
        channels=channels,
        has_cls=False,
        parameters=hidden * (channels * patch**2 + 1) + layers_run * layer,
    )
