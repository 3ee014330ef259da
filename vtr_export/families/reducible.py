"""Which vision towers a reduction before the decoder knows its way in."""

from typing import Final

from vtr_export.families.facts import ModelFacts
from vtr_export.reductions import Grid, Tower

FAMILIES: Final = ("internvl", "llava", "vipllava")
"""Towers that give an image, or each of its tiles, one square of tokens, projected one by one."""


def tower_of(facts: ModelFacts) -> Tower | None:
    """The tower as a reduction sees it; None where a family's tokens are not such a square."""
    vision = facts.vision
    if facts.model_type not in FAMILIES or vision is None or vision.image_size is None:
        return None
    if facts.anyres is not None or facts.features != "tokens":
        return None
    side = vision.image_size // vision.patch_size
    if facts.tokens_per_image not in (None, (side // vision.merge) ** 2):
        return None
    return Tower(
        grid=Grid(side // vision.merge, side // vision.merge),
        patches=Grid(side, side),
        merge=vision.merge,
        width=facts.projector_macs // facts.hidden - facts.hidden,  # of its first of two layers
        hidden=vision.hidden,
        heads=vision.heads,
        intermediate=vision.intermediate,
        layers=vision.layers,
        layers_run=vision.layers_run,
        has_cls=vision.has_cls,
        projected=facts.hidden,
        projector_macs=facts.projector_macs,
    )
