"""LLaVA-OneVision: LLaVA-NeXT's tiles, shrunk where they are too many tokens."""

import re

from vtr_export.errors import CheckpointError
from vtr_export.families.facts import ModelFacts
from vtr_export.families.llava import llava
from vtr_export.families.llava_next import tiled
from vtr_export.families.section import FRESH, Config, filled


def llava_onevision(config: Config, where: str) -> ModelFacts:
    """``vision_aspect_ratio`` anyres_max_9: about nine tiles' tokens at most, and one's more."""
    whole = filled(config)
    ratio = whole["vision_aspect_ratio"]
    found = re.fullmatch(r"anyres_max_([1-9][0-9]*)", ratio) if isinstance(ratio, str) else None
    if found is None:
        message = f"vision_aspect_ratio is {ratio!r}, not anyres_max_ and a number"
        raise CheckpointError(message, where=where, hint=FRESH)
    return tiled(llava(config, where), whole, where, max_tiles=int(found[1]))
