"""Images that are no tokens of a prompt: what a decoder is given of them in every call alike."""

from collections.abc import Mapping
from typing import Final

import numpy as np

from vtr_export.errors import InputError
from vtr_export.runtime.batch import Ints
from vtr_export.runtime.session import Array

WEIGHTS: Final = "vision_weights"  # [B, groups, types, d, rank]
NAMES: Final = (WEIGHTS,)


def laid_beside(features: Array, mask: Ints) -> Mapping[str, Array]:
    """Inputs of the decoder by name, of a first call ``mask`` ``[B, S]`` about these images.

    InputError where not every prompt has its image.
    """
    if len(features) != len(mask):
        raise InputError(
            f"{len(mask)} prompts have {len(features)} images, and this model sees one of each",
            hint="give one image for every prompt",
        )
    return {WEIGHTS: features}


def check_first(lengths: Ints) -> None:
    """InputError for an image in a later turn: what was said before was said without it."""
    if np.any(lengths):
        raise InputError(
            "a later turn brings an image, and this model takes one with the first turn only",
            hint="begin a new conversation",
        )
