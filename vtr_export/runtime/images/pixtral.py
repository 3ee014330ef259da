"""Images that keep their shape up to a longest edge: Pixtral's processor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from PIL import Image

from vtr_export.errors import ArtifactError, InputError
from vtr_export.families import ModelFacts
from vtr_export.runtime.images.inputs import Array, ImageInputs, Seen
from vtr_export.runtime.images.packed import cut, frames, positions
from vtr_export.runtime.images.picture import Picture
from vtr_export.runtime.images.plain import ImageFacts
from vtr_export.runtime.images.resize import Size, read_crop

PROCESSORS: Final = ("PixtralImageProcessor",)
_SILENT: Final[Mapping[str, Any]] = {  # what the processor does where its file says nothing
    "size": {"longest_edge": 1024},
    "patch_size": 16,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


def asked(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What PixtralProcessor, whose file is ``config``, asks of it."""
    patch, merge = config.get("patch_size") or 16, config.get("spatial_merge_size") or 1
    return {"patch_size": patch * merge}


@dataclass(frozen=True)
class EdgeFacts:
    """An image is fitted into ``most`` and becomes a grid of whole blocks, one token each."""

    pixels: ImageFacts
    most: tuple[int, int]  # height, width
    block: int  # pixels of a token's side

    @property
    def where(self) -> str:
        """The file it was read from."""
        return self.pixels.where

    @classmethod
    def read(cls, kind: str, config: Mapping[str, Any], where: str) -> "EdgeFacts":
        """From the JSON of an image processor of class ``kind``."""
        facts = {**_SILENT, **config}
        edge = facts["size"]
        if isinstance(edge, Mapping) and edge.get("longest_edge"):
            edge = int(edge["longest_edge"])
        height, width = read_crop(facts["patch_size"])
        if height != width or height < 1:
            raise ValueError(f"patches of {width}x{height} pixels")
        pixels = ImageFacts.read("SiglipImageProcessor", {**facts, "size": 1}, where)
        return cls(pixels, read_crop(edge), height)

    def inputs(self, images: Sequence[Picture], facts: ModelFacts) -> ImageInputs:
        """Patches in the order of tokens; which of them see each other, and where they stand."""
        vision = facts.vision
        assert vision is not None, "it has a tower"
        self._check(vision.patch_size * vision.merge)
        prepared = [self._prepare(image) for image in images]
        grids = [(1, *(edge // vision.patch_size for edge in one.shape[1:])) for one in prepared]
        patches = [cut(one, vision.patch_size, vision.merge) for one in prepared]
        unit = vision.merge**2
        feeds = {
            "pixel_values": np.concatenate(patches).reshape(-1, unit, vision.patch_values),
            "position_ids": positions(grids, vision.merge).reshape(-1, unit, 2),
            **frames(grids, vision.merge),
        }
        sizes = np.array([one.shape[1:] for one in prepared], np.int64)
        given = {"pixel_values": _stacked(prepared, sizes.max(0)), "image_sizes": sizes}
        return ImageInputs(feeds, given, tuple(_seen(*size) for size in sizes // self.block))

    def _check(self, block: int) -> None:
        if self.block != block:
            raise ArtifactError(
                f"images are prepared in blocks of {self.block} pixels, the model takes {block}",
                where=self.where,
                hint="the processor's file belongs to another checkpoint",
            )

    def _prepare(self, image: Picture) -> Array:
        """``[channels, height, width]``, whole blocks."""
        decoded = self.pixels.decode(image)
        pixels = self.pixels
        if pixels.resize is not None:
            pixels = replace(pixels, resize=Size(exact=self._target(*decoded.shape[1:])))
        prepared = pixels.prepare(decoded)
        _, height, width = prepared.shape
        if height % self.block or width % self.block:
            raise InputError(
                f"an image of {width}x{height} pixels has no whole patches, and is not resized",
                where=self.where,
                hint=f"crop it to a multiple of {self.block} pixels",
            )
        return prepared

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """Fitted, and then up to whole blocks."""
        ratio = max(height / self.most[0], width / self.most[1])
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        rows, columns = (-(-edge // self.block) for edge in (height, width))
        return rows * self.block, columns * self.block

    def view(self, inputs: ImageInputs, number: int) -> Image.Image:
        """One image without its padding."""
        height, width = inputs.given["image_sizes"][number]
        return self.pixels.picture(inputs.given["pixel_values"][number][:, :height, :width])


def _seen(rows: int, columns: int) -> Seen:
    return Seen(int(rows * columns), (1, int(rows), int(columns)))


def _stacked(images: Sequence[Array], size: Array) -> Array:
    """Zeros below and to the right of the smaller ones."""
    gaps = [[(0, 0), *((0, most - edge) for most, edge in zip(size, one.shape[1:], strict=True))]
            for one in images]  # fmt: skip
    return np.stack([np.pad(one, gap) for one, gap in zip(images, gaps, strict=True)])
