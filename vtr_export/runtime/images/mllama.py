"""Images cut into tiles on the smallest canvas that holds them: Mllama's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import Image

from vtr_export.errors import ArtifactError
from vtr_export.families import ModelFacts
from vtr_export.runtime.images.inputs import Array, ImageInputs, Seen
from vtr_export.runtime.images.picture import Picture
from vtr_export.runtime.images.plain import ImageFacts

PROCESSORS: Final = ("MllamaImageProcessor",)
Grid: TypeAlias = tuple[int, int]  # rows, columns of tiles
_SILENT: Final[Mapping[str, Any]] = {  # what the processor does where its file says nothing
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_resize": True,
    "do_pad": True,
    "do_convert_rgb": True,
    "max_image_tiles": 4,
}


@dataclass(frozen=True)
class CanvasFacts:
    """An image keeps its shape on a grid of at most ``most`` tiles of ``side`` pixels.

    ``counts`` are the images of each prompt; without, each is its prompt's only one.
    """

    pixels: ImageFacts  # what is done behind the resize
    side: int
    most: int
    counts: tuple[int, ...] = ()

    @property
    def where(self) -> str:
        """The file it was read from."""
        return self.pixels.where

    @classmethod
    def read(cls, kind: str, config: Mapping[str, Any], where: str) -> "CanvasFacts":
        """From the JSON of an image processor of class ``kind``."""
        facts = {**_SILENT, **config}
        most = int(facts["max_image_tiles"])
        pixels = ImageFacts.read("SiglipImageProcessor", facts, where)
        size = pixels.resize.exact if pixels.resize is not None else None
        if size is None or size[0] != size[1] or not facts["do_pad"] or most < 1:
            raise ValueError("images are to be padded to square tiles")
        return cls(replace(pixels, resize=None), size[0], most)

    def of_prompts(self, counts: Sequence[int]) -> "CanvasFacts":
        """For the images of prompts that have ``counts`` of them."""
        return replace(self, counts=tuple(counts))

    def inputs(self, images: Sequence[Picture], facts: ModelFacts) -> ImageInputs:
        """Tiles of each image, padded with black ones, which of them are some, and their grid."""
        vision = facts.vision
        assert vision is not None, "it has a tower"
        if (self.side, self.most) != (vision.image_size, vision.tiles):
            raise ArtifactError(
                f"images are cut into {self.most} tiles of {self.side} pixels, the model takes "
                f"{vision.tiles} of {vision.image_size}",
                where=self.where,
                hint="the processor's file belongs to another checkpoint",
            )
        parts = [self._tiles(image) for image in images]
        values = np.zeros((len(parts), self.most, *parts[0][0].shape[1:]), np.float32)
        mask = np.zeros((len(parts), self.most), np.int64)
        for number, (tiles, _) in enumerate(parts):
            values[number, : len(tiles)] = tiles
            mask[number, : len(tiles)] = 1
        grids = _grids(self.most)
        ids = np.array([1 + grids.index(grid) for _, grid in parts], np.int64)
        feeds = {"pixel_values": values, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}
        tokens = (self.side // vision.patch_size) ** 2 + 1
        seen = tuple(Seen(len(tiles) * tokens) for tiles, _ in parts)
        return ImageInputs(feeds, self._given(feeds), seen)

    def _given(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """[prompts, images, …]; where a prompt has fewer, an image of no tile but the first."""
        counts = self.counts or (1,) * len(feeds["aspect_ratio_ids"])
        given: dict[str, Array] = {}
        for name, values in feeds.items():
            wide = np.zeros((len(counts), max(counts), *values.shape[1:]), values.dtype)
            if name == "aspect_ratio_mask":
                wide[..., 0] = 1
            rest = values
            for row, count in enumerate(counts):
                wide[row, :count], rest = rest[:count], rest[count:]
            given[name] = wide
        return given

    def _tiles(self, image: Picture) -> tuple[Array, Grid]:
        """``[tiles, channels, side, side]`` row by row, and their grid."""
        pixels = self.pixels.decode(image)
        rows, columns = self.grid(*pixels.shape[1:])
        canvas = rows * self.side, columns * self.side
        height, width = _fitted(pixels.shape[1:], canvas, self.side)
        fitted = self.pixels.resized(pixels, height, width)
        whole = np.zeros((len(fitted), *canvas), fitted.dtype)
        whole[:, :height, :width] = fitted
        ready = self.pixels.prepare(whole)
        cut = ready.reshape(len(ready), rows, self.side, columns, self.side)
        tiles = cut.transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1, self.side, self.side)
        return tiles, (rows, columns)

    def grid(self, height: int, width: int) -> Grid:
        """The canvas that enlarges an image least, else shrinks it least; the smallest of those."""
        grids = _grids(self.most)
        scales = [
            min(rows * self.side / height, columns * self.side / width) for rows, columns in grids
        ]
        larger = [scale for scale in scales if scale >= 1]
        best = min(larger) if larger else max(scales)
        fits = [grid for grid, scale in zip(grids, scales, strict=True) if scale == best]
        return min(fits, key=lambda grid: grid[0] * grid[1])

    def view(self, inputs: ImageInputs, number: int) -> Image.Image:
        """Tiles under each other."""
        used = int(inputs.feeds["aspect_ratio_mask"][number].sum())
        tiles = inputs.feeds["pixel_values"][number, :used]
        return self.pixels.picture(np.concatenate(list(tiles), axis=1))


def _grids(most: int) -> list[Grid]:
    """Of at most so many tiles, in the order of their ids."""
    sides = range(1, most + 1)
    return [(rows, columns) for rows in sides for columns in sides if rows * columns <= most]


def _fitted(size: tuple[int, ...], canvas: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width between a tile's side and the canvas, the shape as it was."""
    height, width = size
    tall, wide = (min(max(own, side), most) for own, most in zip(size, canvas, strict=True))
    if wide / width < tall / height:
        return min(int(height * (wide / width)) or 1, tall), wide
    return tall, min(int(width * (tall / height)) or 1, wide)
