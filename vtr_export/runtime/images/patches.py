"""Images that keep their size, cut into patches: Qwen2-VL's processor, and those that use it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from PIL import Image

from vtr_export.errors import ArtifactError, InputError
from vtr_export.families import ModelFacts, VisionFacts
from vtr_export.runtime.images.inputs import Array, ImageInputs, Seen
from vtr_export.runtime.images.packed import Grid, between, cut, frames, positions, windows
from vtr_export.runtime.images.picture import Picture, load
from vtr_export.runtime.images.plain import ImageFacts
from vtr_export.runtime.images.resize import Size

MAX_RATIO: Final = 200  # of an image's sides
PROCESSORS: Final = ("Qwen2VLImageProcessor",)
_SILENT: Final[Mapping[str, Any]] = {  # what the processor does where its file says nothing
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}


@dataclass(frozen=True)
class PatchFacts:
    """An image becomes a grid of patches, ``merge`` by ``merge`` of them one vision token."""

    pixels: ImageFacts
    least: int  # pixels of an image
    most: int
    patch: int
    merge: int
    frames: int  # a still image stands for so many

    @property
    def where(self) -> str:
        """The file it was read from."""
        return self.pixels.where

    @classmethod
    def read(cls, kind: str, config: Mapping[str, Any], where: str) -> "PatchFacts":
        """From the JSON of an image processor of class ``kind``."""
        facts = {**_SILENT, **config}
        least, most = _pixel_limits(facts)
        return cls(
            pixels=ImageFacts.read("SiglipImageProcessor", {**facts, "size": 1}, where),
            least=least,
            most=most,
            patch=int(facts["patch_size"]),
            merge=int(facts["merge_size"]),
            frames=int(facts["temporal_patch_size"]),
        )

    def inputs(self, images: Sequence[Picture], facts: ModelFacts) -> ImageInputs:
        """Patches in the order of tokens; which of them see each other, and where they stand."""
        vision = facts.vision
        assert vision is not None, "it has a tower"
        self._check(vision)
        parts = [self._patches(load(image)) for image in images]
        grids = [grid for _, grid in parts]
        patches = np.concatenate([values for values, _ in parts])
        unit = self.merge**2
        feeds = {
            "pixel_values": patches.reshape(-1, unit, patches.shape[1]),
            "position_ids": positions(grids, self.merge).reshape(-1, unit, 2),
            **frames(grids, self.merge),
        }
        if vision.window is not None:
            feeds |= windows(grids, self.merge, vision.window)
        if vision.grid is not None:
            feeds |= between(grids, self.merge, vision.grid)
        given = {"pixel_values": patches, "image_grid_thw": np.array(grids, np.int64)}
        return ImageInputs(feeds, given, tuple(map(self._seen, grids)))

    def _check(self, vision: VisionFacts) -> None:
        ours = (self.patch, self.merge)
        if ours != (theirs := (vision.patch_size, vision.merge)):
            raise ArtifactError(
                f"images are cut by patch and merge sizes {ours}, the model has {theirs}",
                where=self.where,
                hint="the processor's file belongs to another checkpoint",
            )

    def _seen(self, grid: Grid) -> Seen:
        time, rows, columns = grid
        own = time, rows // self.merge, columns // self.merge
        return Seen(math.prod(own), own)

    def _patches(self, image: Image.Image) -> tuple[Array, Grid]:
        """``[patches, channels * frames * patch * patch]``, blocks of merged ones together."""
        pixels = self.pixels
        if pixels.resize is not None:
            pixels = replace(pixels, resize=Size(exact=self._target(image.height, image.width)))
        values = pixels.pixel_values([image])[0].astype(np.float32)
        _, height, width = values.shape
        block = self.patch * self.merge
        if height % block or width % block:
            raise InputError(
                f"an image of {width}x{height} pixels has no whole patches, and is not resized",
                where=self.where,
                hint=f"crop it to a multiple of {block} pixels",
            )
        patches = cut(values, self.patch, self.merge)
        still = np.repeat(patches[:, :, :, None], self.frames, axis=3)
        rows, columns = height // self.patch, width // self.patch
        return still.reshape(rows * columns, -1), (1, rows, columns)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """Multiples of a merged patch with pixels between the limits, about the same shape."""
        if (ratio := max(height, width) / min(height, width)) > MAX_RATIO:
            raise InputError(
                f"an image of {width}x{height} pixels is {ratio:.0f} times as long as wide",
                hint=f"crop it: at most {MAX_RATIO} times are allowed",
            )
        block = self.patch * self.merge
        rows, columns = round(height / block), round(width / block)
        if rows * columns * block**2 > self.most:
            scale = math.sqrt(height * width / self.most)
            rows = max(1, math.floor(height / scale / block))
            columns = max(1, math.floor(width / scale / block))
        elif rows * columns * block**2 < self.least:
            scale = math.sqrt(self.least / (height * width))
            rows, columns = math.ceil(height * scale / block), math.ceil(width * scale / block)
        return rows * block, columns * block

    def view(self, inputs: ImageInputs, number: int) -> Image.Image:
        """One image's patches put together again."""
        grids = inputs.given["image_grid_thw"]
        ends = np.cumsum(grids.prod(1))
        _, rows, columns = grids[number] // np.array((1, self.merge, self.merge))
        own = inputs.given["pixel_values"][ends[number] - grids[number].prod() : ends[number]]
        shape = (rows, columns, self.merge, self.merge, -1, self.frames, self.patch, self.patch)
        blocks = own.reshape(shape)[:, :, :, :, :, 0].transpose(4, 0, 2, 5, 1, 3, 6)
        block = self.patch * self.merge
        values = blocks.reshape(1, -1, rows * block, columns * block)
        return self.pixels.view(ImageInputs({"pixel_values": values}, {}, ()), 0)


def _pixel_limits(facts: Mapping[str, Any]) -> tuple[int, int]:
    """Least and most pixels: ``min_pixels`` and ``max_pixels``, or the edges of ``size``."""
    size = facts["size"]
    least = facts.get("min_pixels") or size["shortest_edge"]
    most = facts.get("max_pixels") or size["longest_edge"]
    if not 0 < int(least) <= int(most):
        raise ValueError(f"{least} to {most} pixels")
    return int(least), int(most)
