"""Images that keep their shape between two edges, whole or with their quarters: Idefics2's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from PIL import Image

from vtr_export.errors import InputError
from vtr_export.families import ModelFacts, VisionFacts
from vtr_export.runtime.images.inputs import Array, ImageInputs, Seen
from vtr_export.runtime.images.packed import buckets, cut
from vtr_export.runtime.images.picture import Picture
from vtr_export.runtime.images.plain import ImageFacts
from vtr_export.runtime.images.resize import Size

PROCESSORS: Final = ("Idefics2ImageProcessor",)
_SILENT: Final[Mapping[str, Any]] = {  # what the processor does where its file says nothing
    "size": {"shortest_edge": 378, "longest_edge": 980},
    "resample": 2,
    "do_pad": True,
}


@dataclass(frozen=True)
class SplitFacts:
    """An image, behind its four quarters where it is ``split``: each is a tile of its own size."""

    pixels: ImageFacts
    edges: tuple[int, int] | None  # least and most pixels of a side; None: one size, or as it is
    split: bool

    @property
    def where(self) -> str:
        """The file it was read from."""
        return self.pixels.where

    @classmethod
    def read(cls, kind: str, config: Mapping[str, Any], where: str) -> "SplitFacts":
        """From the JSON of an image processor of class ``kind``."""
        facts = {**_SILENT, **config}
        split = bool(facts.pop("do_image_splitting", False))
        if not facts.pop("do_pad"):
            raise ValueError("do_pad is false, and images of one prompt have unlike sizes")
        size, edges = facts["size"], None
        if isinstance(size, Mapping) and "longest_edge" in size:
            edges = int(size["shortest_edge"]), int(size["longest_edge"])
            facts["size"] = edges[1]
        return cls(ImageFacts.read("SiglipImageProcessor", facts, where), edges, split)

    def inputs(self, images: Sequence[Picture], facts: ModelFacts) -> ImageInputs:
        """Whole patches of each tile, and the learned positions they share."""
        vision = facts.vision
        assert vision is not None, "it has a tower"
        assert vision.latents is not None, "it has a resampler"
        parts = [self._tiles(image) for image in images]
        tiles = [tile for part in parts for tile in part]
        size = np.max([tile.shape[1:] for tile in tiles], axis=0)
        mask = _together([np.ones(tile.shape[1:], np.int64) for tile in tiles], size)
        given = {"pixel_values": _together(tiles, size)[None], "pixel_attention_mask": mask[None]}
        seen = tuple(Seen(len(part) * vision.latents) for part in parts)
        return ImageInputs(self._feeds(tiles, vision), given, seen)

    def _feeds(self, tiles: Sequence[Array], vision: VisionFacts) -> dict[str, Array]:
        assert vision.image_size is not None, "learned positions"
        patch, side = vision.patch_size, vision.image_size // vision.patch_size
        rows, places = [], []
        for tile in tiles:
            height, width = (edge // patch for edge in tile.shape[1:])
            whole = tile[:, : height * patch, : width * patch]
            rows.append(cut(whole, patch, 1).reshape(height * width, -1))
            places.append(buckets(height, width, side).reshape(-1))
        longest = max(map(len, places))
        values = _together(rows, (longest, vision.patch_values))
        return {"pixel_values": values, "position_ids": _together(places, (longest,), -1)}

    def _tiles(self, image: Picture) -> list[Array]:
        """``[channels, height, width]`` each: the quarters row by row, then the whole."""
        pixels = self.pixels.decode(image)
        _, height, width = pixels.shape
        if not self.split:
            return [self._prepare(pixels)]
        if height < 2:  # one pixel wide it can: into black ones, so does transformers
            raise InputError(
                f"an image of {width}x{height} pixels cannot be cut into quarters",
                hint="crop it to a less extreme shape first",
            )
        down, right = height // 2, width // 2
        upper, lower = pixels[:, :down], pixels[:, down:]
        quarters = [half[..., part] for half in (upper, lower) for part in _halves(right)]
        return [self._prepare(one) for one in (*quarters, pixels)]

    def _prepare(self, pixels: Array) -> Array:
        own = self.pixels
        if own.resize is not None and self.edges is not None:
            own = replace(own, resize=Size(exact=_target(self.edges, *pixels.shape[1:])))
        return own.prepare(pixels)

    def view(self, inputs: ImageInputs, number: int) -> Image.Image:
        """The whole image, without its quarters and its padding."""
        tile = (number + 1) * (5 if self.split else 1) - 1
        height, width = np.argwhere(inputs.given["pixel_attention_mask"][0, tile])[-1] + 1
        return self.pixels.picture(inputs.given["pixel_values"][0, tile, :, :height, :width])


def _halves(middle: int) -> tuple[slice, slice]:
    return slice(None, middle), slice(middle, None)


def _target(edges: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """At most the longest edge in the same shape; then at least the shortest, in whatever shape."""
    least, most = edges
    shape = width / height
    if width >= height and width > most:
        height, width = int(most / shape), most
    elif height > width and height > most:
        height, width = most, int(most * shape)
    return max(height, least), max(width, least)


def _together(parts: Sequence[Array], size: Sequence[int], gap: int = 0) -> Array:
    """``[parts, ..., *size]``: ``gap`` behind what is smaller in the last axes."""
    padded = []
    for part in parts:
        own = part.shape[part.ndim - len(size) :]
        missing = [(0, most - edge) for most, edge in zip(size, own, strict=True)]
        rest = [(0, 0)] * (part.ndim - len(size))
        padded.append(np.pad(part, [*rest, *missing], constant_values=gap))
    return np.stack(padded)
