"""Images that are no tokens of a prompt: what a decoder is given of them in every call alike."""

from collections.abc import Mapping
from typing import Final

import numpy as np

from vtr_export.errors import InputError
from vtr_export.runtime.batch import Ints
from vtr_export.runtime.session import Array

WEIGHTS: Final = "vision_weights"  # [B, groups, types, d, rank]
KEYS: Final = "vision_keys"  # [B, V, width]
PLACES: Final = "vision_places"  # [B, V] positions of the tokens that stand for their images
NAMES: Final = (WEIGHTS, KEYS, PLACES)
NOWHERE: Final = 2**31 - 1  # the place of a pad: no row stands behind it


def weights(features: Array, mask: Ints) -> Mapping[str, Array]:
    """An image's for each row of ``mask`` ``[B, S]``. InputError where a prompt has not one."""
    if len(features) != len(mask):
        raise InputError(
            f"{len(mask)} prompts have {len(features)} images, and this model sees one of each",
            hint="give one image for every prompt",
        )
    return {WEIGHTS: features}


def keys(features: Array, mask: Ints, index: Ints) -> Mapping[str, Array]:
    """``features`` ``[images, L, width]`` of the images whose tokens are at ``index`` ``[B, n]``.

    They are in reading order; a row's keys come first, then its pads.
    """
    real = np.take_along_axis(mask, index, 1) != 0
    counts, each = real.sum(axis=1), features.shape[1]
    if int(counts.sum()) != len(features):
        raise InputError(
            f"the prompts have places for {int(counts.sum())} images, {len(features)} are given",
            hint="give one image for each place",
        )
    found = np.zeros((len(mask), int(counts.max()) * each, features.shape[2]), features.dtype)
    places = np.full(found.shape[:2], NOWHERE, np.int64)
    positions, start = np.cumsum(mask, axis=1) - 1, 0
    for row, count in enumerate(counts):
        rows = features[start : start + count]
        found[row, : count * each] = rows.reshape(-1, features.shape[2])
        places[row, : count * each] = np.repeat(positions[row, index[row, real[row]]], each)
        start += count
    return {KEYS: found, PLACES: places}


def check_first(lengths: Ints) -> None:
    """InputError for an image in a later turn: what was said before was said without it."""
    if np.any(lengths):
        raise InputError(
            "a later turn brings an image, and this model takes them with the first turn only",
            hint="begin a new conversation",
        )
