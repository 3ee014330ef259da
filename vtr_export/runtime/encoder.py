"""The vision encoder: images in, vision tokens out, and what its reductions say of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vtr_export.errors import InputError
from vtr_export.manifest import Reduced
from vtr_export.runtime.batch import Ints
from vtr_export.runtime.images import ImageInputs
from vtr_export.runtime.session import Array, Port, Session

FEATURES: Final = "image_features"
COUNTS: Final = "image_counts"
PROTECTED: Final = "image_protected"
SOURCE: Final = "image_source"


@dataclass(frozen=True)
class Encoded:
    """The vision tokens of all images of a call, in order.

    ``counts`` is how many each image, or tile, has, where that depends on it; ``protected`` tells
    tokens that no cut drops, ``source`` which of the unreduced ones each was (-1: none alone).
    """

    features: Array  # [..., D]
    counts: Ints | None = None  # [images or tiles]
    protected: NDArray[np.bool_] | None = None  # [tokens]
    source: Ints | None = None  # [tokens]

    @property
    def tokens(self) -> int:
        """How many."""
        return int(self.features.size // self.features.shape[-1])


def encode(vision: Session, feeds: Mapping[str, Array]) -> Encoded:
    """One image after the other where the graph takes one."""
    said = [vision.run(each) for each in image_by_image(vision.inputs, feeds)]
    parts = {name: [np.asarray(each[name]) for each in said] for name in said[0]}
    own = {
        name: part[0] if len(part) == 1 else np.concatenate(part) for name, part in parts.items()
    }
    features = own.pop(next(iter(own)))  # whatever it is called
    flat: dict[str, Any] = {name: own[name].reshape(-1) for name in own}
    return Encoded(features, flat.get(COUNTS), flat.get(PROTECTED), flat.get(SOURCE))


def left(inputs: ImageInputs, reduced: Reduced | None, counts: Ints | None = None) -> ImageInputs:
    """``inputs`` whose images have the tokens that reductions leave; ``counts``: of each tile."""
    if reduced is None:
        return inputs
    tiles = [image.tokens // reduced.before for image in inputs.seen]
    ends = np.cumsum(tiles)
    each = np.full(sum(tiles), reduced.most) if counts is None else counts
    sizes = [int(each[end - own : end].sum()) for end, own in zip(ends, tiles, strict=True)]
    seen = zip(inputs.seen, sizes, strict=True)
    fewer = tuple(replace(image, tokens=size, grid=None) for image, size in seen)
    return ImageInputs(inputs.feeds, inputs.given, fewer)


def origins(encoded: Encoded, reduced: Reduced) -> Ints:
    """``[tokens]``: which of a call's tokens before reductions each was, -1 for none alone."""
    if encoded.source is None:
        raise InputError(
            "each token of this artifact stands for several patches: none is kept or dropped",
            hint="ask without --show-kept",
        )
    counts = encoded.counts
    if counts is None:
        counts = np.full(encoded.tokens // max(reduced.most, 1), reduced.most)
    tile = np.repeat(np.arange(len(counts)), counts)
    where: Ints = np.where(encoded.source < 0, -1, tile * reduced.before + encoded.source)
    return where


def image_by_image(
    ports: Mapping[str, Port], feeds: Mapping[str, Array]
) -> Sequence[dict[str, Array]]:
    """``feeds`` of single images, where every input of the graph is of one image."""
    counts = {len(values) for values in feeds.values()}
    if len(counts) != 1 or any(ports[name].shape[0] != 1 for name in feeds):
        return [dict(feeds)]
    (count,) = counts
    return [{n: x[at : at + 1] for n, x in feeds.items()} for at in range(count)]
