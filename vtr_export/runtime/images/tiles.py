"""Images cut into tiles of one size, and a thumbnail: GOT-OCR2's processor, as InternVL uses it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import Image

from vtr_export.errors import ArtifactError
from vtr_export.families import ModelFacts, VisionFacts
from vtr_export.runtime.images.inputs import Array, ImageInputs, Seen
from vtr_export.runtime.images.picture import Picture, load
from vtr_export.runtime.images.plain import ImageFacts
from vtr_export.runtime.images.resize import Size, read_crop

Grid: TypeAlias = tuple[int, int]  # columns, rows of tiles
PROCESSORS: Final = ("GotOcr2ImageProcessor",)
_SILENT: Final[Mapping[str, Any]] = {  # what the processor does where its file says nothing
    "size": {"height": 384, "width": 384},
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "crop_to_patches": False,
    "min_patches": 1,
    "max_patches": 12,
}


@dataclass(frozen=True)
class TileFacts:
    """An image is resized to a grid of ``least`` to ``most`` tiles and cut, row by row.

    The image as a whole follows as one tile more, unless the grid has one alone. That one may be
    padded to a square first, as OpenGVLab's pad2square asks.
    """

    pixels: ImageFacts  # what is done to a tile
    height: int
    width: int
    least: int
    most: int
    by_rows: bool = True  # how a tile's tokens lie; if not, column by column

    @property
    def where(self) -> str:
        """The file it was read from."""
        return self.pixels.where

    @classmethod
    def read(cls, kind: str, config: Mapping[str, Any], where: str) -> "TileFacts":
        """From the JSON of an image processor of class ``kind``."""
        facts = {**_SILENT, **config}
        height, width = read_crop(facts["size"])
        least, most = int(facts["min_patches"]), int(facts["max_patches"])
        if not 0 < least <= most or min(height, width) < 1:
            raise ValueError(f"{least} to {most} tiles of {width}x{height} pixels")
        cuts = facts["crop_to_patches"] and most > 1
        return cls(
            pixels=ImageFacts.read("SiglipImageProcessor", facts, where),
            height=height,
            width=width,
            least=least if cuts else 1,
            most=most if cuts else 1,
            by_rows=facts.get("ps_version") != "v1",
        )

    def inputs(self, images: Sequence[Picture], facts: ModelFacts) -> ImageInputs:
        """``pixel_values`` [tiles, channels, height, width] of all images, one after the other."""
        vision = facts.vision
        assert vision is not None, "it has a tower"
        self._check(vision)
        parts = [self._tiles(load(image)) for image in images]
        values = {"pixel_values": np.concatenate(parts)}
        side = self.height // vision.patch_size // vision.merge
        seen = tuple(seen_in_tiles(len(part), side, by_rows=self.by_rows) for part in parts)
        return ImageInputs(values, values, seen)

    def _check(self, vision: VisionFacts) -> None:
        if (self.height, self.width) != (vision.image_size, vision.image_size):
            raise ArtifactError(
                f"tiles of {self.width}x{self.height} pixels are cut, "
                f"the model takes {vision.image_size}x{vision.image_size}",
                where=self.where,
                hint="the processor's file belongs to another checkpoint",
            )

    def _tiles(self, image: Image.Image) -> Array:
        """``[tiles, channels, height, width]``: the grid's, row by row, then the thumbnail."""
        if self.most == 1:
            return self.pixels.pixel_values([image])
        columns, rows = self.grid(image.width, image.height)
        canvas = Size(exact=(rows * self.height, columns * self.width))
        whole = replace(self.pixels, resize=canvas).pixel_values([image])[0]
        cut = whole.reshape(-1, rows, self.height, columns, self.width).transpose(1, 3, 0, 2, 4)
        tiles: Array = cut.reshape(rows * columns, -1, self.height, self.width)
        if len(tiles) == 1:
            return tiles
        small = replace(self.pixels, resize=Size(exact=(self.height, self.width)))
        return np.concatenate((tiles, small.pixel_values([image])))

    def grid(self, width: int, height: int) -> Grid:
        """The grid whose shape is nearest to the image's.

        Of equally near ones the larger, as long as the image has more than half its pixels.
        """
        best, nearest = (1, 1), float("inf")
        for columns, rows in _grids(self.least, self.most):
            distance = abs(width / height - columns / rows)
            half = 0.5 * self.height * self.width * columns * rows
            if distance < nearest or (distance == nearest and width * height > half):
                best, nearest = (columns, rows), distance
        return best

    def view(self, inputs: ImageInputs, number: int) -> Image.Image:
        """Tiles under each other."""
        return self.pixels.picture(sheet(inputs, number))


def seen_in_tiles(
    tiles: int, side: int, *, cut: tuple[int, int] | None = None, by_rows: bool = True
) -> Seen:
    """Of square tiles of ``side`` by ``side`` tokens; ``sheet`` shows them as they lie."""
    return Seen(tiles * side**2, (1, tiles * side, side) if by_rows else None, cut)


def sheet(inputs: ImageInputs, number: int) -> Array:
    """Pixel values of one image's tiles under each other: so lie their tokens."""
    counts = np.array([image.tokens for image in inputs.seen])
    values = inputs.feeds["pixel_values"]
    ends = np.cumsum(counts) * len(values) // counts.sum()
    return np.concatenate(list(values[ends[number - 1] if number else 0 : ends[number]]), axis=1)


def _grids(least: int, most: int) -> list[Grid]:
    """Every grid of so many tiles, the smaller first."""
    sides = range(1, most + 1)
    grids = [(columns, rows) for columns in sides for rows in sides]
    return sorted((g for g in grids if least <= g[0] * g[1] <= most), key=lambda g: g[0] * g[1])
