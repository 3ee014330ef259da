"""Images enlarged to whole tiles and cut, and the image as a whole: Idefics3 and SmolVLM."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from vtr_export.errors import ArtifactError
from vtr_export.families import ModelFacts, VisionFacts
from vtr_export.runtime.images.inputs import Array, ImageInputs
from vtr_export.runtime.images.picture import Picture
from vtr_export.runtime.images.plain import ImageFacts
from vtr_export.runtime.images.tiles import seen_in_tiles, sheet

LARGEST: Final = 4096  # pixels of a side, before the cut
LANCZOS: Final = 1  # Pillow's number
PROCESSORS: Final = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
_SILENT: Final[Mapping[str, Any]] = {  # what the processors do where their file says nothing
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
    "resample": LANCZOS,
}


@dataclass(frozen=True)
class CutFacts:
    """An image's longest side becomes ``longest`` pixels, both sides whole tiles of ``tile``.

    More than one tile are cut row by row, and followed by the image as a whole. ``longest`` None:
    the image keeps its size; ``splits`` False: the image as a whole alone.
    """

    pixels: ImageFacts  # what is done to a tile that is cut
    tile: int
    longest: int | None
    splits: bool

    @property
    def where(self) -> str:
        """The file it was read from."""
        return self.pixels.where

    @classmethod
    def read(cls, kind: str, config: Mapping[str, Any], where: str) -> "CutFacts":
        """From the JSON of an image processor of class ``kind``."""
        facts = {**_SILENT, **config}
        plain = {"do_resize": False, "do_pad": False, "do_image_splitting": False, "size": 1}
        longest = int(facts["size"]["longest_edge"])
        return cls(
            pixels=ImageFacts.read("SiglipImageProcessor", {**facts, **plain}, where),
            tile=int(facts["max_image_size"]["longest_edge"]),
            longest=longest if facts.get("do_resize", True) else None,
            splits=bool(facts["do_image_splitting"]),
        )

    def inputs(self, images: Sequence[Picture], facts: ModelFacts) -> ImageInputs:
        """``pixel_values`` [tiles, channels, height, width] of all images, one after the other."""
        vision = facts.vision
        assert vision is not None, "it has a tower"
        self._check(vision)
        parts = [self._tiles(image) for image in images]
        tiles = np.concatenate([values for values, _ in parts])
        side = self.tile // vision.patch_size // vision.merge
        mask = np.ones((1, len(tiles), self.tile, self.tile), np.int64)
        given = {"pixel_values": tiles[None], "pixel_attention_mask": mask}
        seen = tuple(seen_in_tiles(len(values), side, cut=grid) for values, grid in parts)
        return ImageInputs({"pixel_values": tiles}, given, seen)

    def _check(self, vision: VisionFacts) -> None:
        if self.tile != vision.image_size:
            raise ArtifactError(
                f"tiles of {self.tile} pixels are cut, the model takes {vision.image_size}",
                where=self.where,
                hint="the processor's file belongs to another checkpoint",
            )

    def _tiles(self, picture: Picture) -> tuple[Array, tuple[int, int]]:
        """``[tiles, channels, tile, tile]`` and the rows and columns that were cut."""
        pixels, tile = self.pixels.decode(picture), self.tile
        if self.longest is not None:
            _, height, width = pixels.shape
            pixels = self.pixels.resized(pixels, *fitted(height, width, self.longest))
        if not self.splits:
            return self.pixels.prepare(self.pixels.resized(pixels, tile, tile))[None], (0, 0)
        _, height, width = pixels.shape
        rows, columns = whole_tiles(height, width, tile)
        pixels = self.pixels.resized(pixels, rows * tile, columns * tile)
        cut = pixels.reshape(-1, rows, tile, columns, tile).transpose(1, 3, 0, 2, 4)
        tiles = list(cut.reshape(rows * columns, -1, tile, tile))
        if len(tiles) == 1:
            return self.pixels.prepare(tiles[0])[None], (0, 0)
        tiles.append(self.pixels.resized(pixels, tile, tile))
        return np.stack([self.pixels.prepare(each) for each in tiles]), (rows, columns)

    def view(self, inputs: ImageInputs, number: int) -> Image.Image:
        """Tiles under each other, the image as a whole last."""
        return self.pixels.picture(sheet(inputs, number))


def fitted(height: int, width: int, longest: int) -> tuple[int, int]:
    """Height and width with ``longest`` pixels at the longest side, the other one even."""
    ratio = width / height
    if width >= height:
        height, width = int(longest / ratio), longest
        height += height % 2
    else:
        height, width = longest, int(longest * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > LARGEST:
        height, width = int(LARGEST / ratio), LARGEST
    elif height > width and height > LARGEST:
        height, width = LARGEST, int(LARGEST * ratio)
    return max(height, 1), max(width, 1)


def whole_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """Rows and columns of tiles that hold the image, its shape kept about."""
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / tile)
        return math.ceil(int(columns * tile / ratio) / tile), columns
    rows = math.ceil(height / tile)
    return rows, math.ceil(int(rows * tile * ratio) / tile)
