"""LLaVA-NeXT: an image is tiles of the best fitting size; a newline ends each row of tokens."""

from collections.abc import Sequence
from dataclasses import replace

from vtr_export.errors import CheckpointError
from vtr_export.families.facts import Anyres, ModelFacts
from vtr_export.families.llava import llava
from vtr_export.families.section import FRESH, Config, filled


def llava_next(config: Config, where: str) -> ModelFacts:
    """LLaVA with tiles; the newline is a parameter beside the projector's."""
    return tiled(llava(config, where), filled(config), where, max_tiles=None)


def tiled(facts: ModelFacts, config: Config, where: str, *, max_tiles: int | None) -> ModelFacts:
    """``facts`` of one tile as those of a model that takes images in tiles.

    Raises CheckpointError for pinpoints that are no whole tiles, and tiles that are no squares.
    """
    vision, tokens = facts.vision, facts.tokens_per_image
    assert vision is not None
    assert vision.image_size is not None
    side = vision.image_size // vision.patch_size
    if tokens != side**2:
        raise CheckpointError(
            f"a tile has {tokens} tokens, which are no {side} rows of {side}",
            where=where,
            hint="vision_feature_select_strategy is default for CLIP, and full for SigLIP",
        )
    return replace(
        facts,
        tokens_per_image=None,
        projector_parameters=facts.projector_parameters + facts.hidden,
        anyres=Anyres(_pinpoints(config, vision.image_size, where), side, max_tiles),
    )


def _pinpoints(config: Config, size: int, where: str) -> tuple[tuple[int, int], ...]:
    points = config["image_grid_pinpoints"]
    if not isinstance(points, list) or not points or not all(_fits(pair, size) for pair in points):
        raise CheckpointError(
            f"image_grid_pinpoints {points!r} are no heights and widths in tiles of {size} pixels",
            where=where,
            hint=FRESH,
        )
    return tuple((height, width) for height, width in points)


def _fits(pair: object, size: int) -> bool:
    return (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(type(edge) is int and edge > 0 and edge % size == 0 for edge in pair)
    )
