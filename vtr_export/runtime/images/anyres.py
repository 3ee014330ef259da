"""Images in tiles of any resolution: LLaVA-NeXT's processor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any, Final

import numpy as np
from PIL import Image

from vtr_export.errors import ArtifactError
from vtr_export.families import ModelFacts
from vtr_export.families.section import defaults
from vtr_export.runtime.images.inputs import Array, ImageInputs, Seen
from vtr_export.runtime.images.picture import Picture
from vtr_export.runtime.images.plain import ImageFacts
from vtr_export.runtime.images.tile_tokens import Tokens, tiled

PROCESSORS: Final = {"LlavaNextImageProcessor": "llava_next"}  # whose pinpoints it takes
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Tiled:
    """One image: the whole of it and then its tiles, [tiles, 3, H, W], and its tokens."""

    pixels: Array
    size: Size  # of the image, in pixels
    tokens: Tokens


@dataclass(frozen=True)
class AnyresFacts:
    """An image is fitted into one of ``pinpoints`` and cut into tiles of ``edge`` pixels."""

    tile: ImageFacts  # what is done to each
    pinpoints: tuple[Size, ...]
    whole: Size  # what the whole image is resized to
    edge: int

    @property
    def where(self) -> str:
        """The file it was read from."""
        return self.tile.where

    @classmethod
    def read(cls, kind: str, config: Mapping[str, Any], where: str) -> "AnyresFacts":
        """From the JSON of an image processor of class ``kind``; ArtifactError for nonsense."""
        silent = defaults()[PROCESSORS[kind]]["derived"]["image_grid_pinpoints"]
        tile = ImageFacts.read(kind, config, where)
        try:
            points = config.get("image_grid_pinpoints") or silent
            pinpoints = tuple((int(height), int(width)) for height, width in points)
            size = tile.resize
            assert size is not None
            whole = size.exact or (size.shortest_edge or 0,) * 2
            edge = tile.crop[0] if tile.crop else whole[0]
        except (AssertionError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"the image processor's facts make no sense: {error!r}",
                where=where,
                hint="take the file from the checkpoint again",
            ) from error
        return cls(tile, pinpoints, whole, edge)

    def inputs(self, images: Sequence[Picture], facts: ModelFacts) -> ImageInputs:
        """All tiles side by side, and which of their tokens an image shows in which order."""
        self._check(facts)
        return self._together([self._tiled(image, facts) for image in images], facts)

    def _together(self, parts: Sequence[Tiled], facts: ModelFacts) -> ImageInputs:
        assert facts.anyres is not None
        most, count = max(len(part.pixels) for part in parts), facts.anyres.side**2
        index, rows = [], 0
        for part in parts:
            index.append(part.tokens.after(rows))
            rows += len(part.pixels) * count
        return ImageInputs(
            {
                "pixel_values": np.concatenate([part.pixels for part in parts]),
                "pack_index": np.concatenate(index)[:, 0],
            },
            {
                "pixel_values": np.stack([_padded(part.pixels, most) for part in parts]),
                "image_sizes": np.array([part.size for part in parts], np.int64),
            },
            tuple(Seen(len(part.tokens)) for part in parts),
        )

    def _tiled(self, image: Picture, facts: ModelFacts) -> Tiled:
        assert facts.anyres is not None
        pixels = self.tile.decode(image)
        height, width = pixels.shape[1:]
        best = best_resolution((height, width), self.pinpoints)
        fitted = self.tile.resized(pixels, *_fitted((height, width), best))
        whole = self.tile.resized(pixels, *self.whole)
        pieces = [
            self.tile.prepare(one) for one in (whole, *_cut(_centred(fitted, best), self.edge))
        ]
        tiles = best[0] // self.edge, best[1] // self.edge
        tokens = tiled(facts.anyres, tiles, height, width)
        return Tiled(np.stack(pieces), (height, width), tokens)

    def view(self, inputs: ImageInputs, number: int) -> Image.Image:
        """The whole image, without its tiles."""
        return self.tile.picture(inputs.given["pixel_values"][number, 0])

    def _check(self, facts: ModelFacts) -> None:
        """The model counts tiles by its own configuration."""
        assert facts.anyres is not None, "a family of images in tiles"
        assert facts.vision is not None, "it has a tower"
        ours, theirs = (
            (self.edge, self.pinpoints),
            (facts.vision.image_size, facts.anyres.pinpoints),
        )
        if ours != theirs:
            raise ArtifactError(
                f"images are cut into tiles of {ours[0]} pixels at {len(ours[1])} resolutions, "
                f"the model takes {theirs[0]} at {len(theirs[1])} others",
                where=self.where,
                hint="the processor's file belongs to another checkpoint",
            )


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The one in which most of an image is left, and of these the one that wastes least."""
    height, width = size
    best, most, least = pinpoints[0], 0, inf
    for tall, wide in pinpoints:
        scale = min(wide / width, tall / height)
        left = min(int(width * scale) * int(height * scale), width * height)
        wasted = tall * wide - left
        if left > most or (left == most and wasted < least):
            best, most, least = (tall, wide), left, wasted
    return best


def _fitted(size: Size, into: Size) -> Size:
    """Height and width of an image that fills ``into`` in one of them."""
    (height, width), (tall, wide) = size, into
    down, across = tall / height, wide / width
    if across < down:
        return min(ceil(height * across), tall), wide
    return tall, min(ceil(width * down), wide)


def _centred(pixels: Array, size: Size) -> Array:
    """Zeros around it."""
    gaps = [wanted - now for wanted, now in zip(size, pixels.shape[1:], strict=True)]
    return np.pad(pixels, [(0, 0), *((gap // 2, gap - gap // 2) for gap in gaps)])


def _cut(pixels: Array, edge: int) -> list[Array]:
    """Tiles of ``edge`` by ``edge`` pixels, row by row."""
    _, height, width = pixels.shape
    return [
        pixels[:, y : y + edge, x : x + edge]
        for y in range(0, height, edge)
        for x in range(0, width, edge)
    ]


def _padded(tiles: Array, count: int) -> Array:
    """Zeros for the tiles that others have more."""
    return np.pad(tiles, [(0, count - len(tiles)), (0, 0), (0, 0), (0, 0)])
