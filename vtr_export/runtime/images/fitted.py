"""Images fitted into a square of the processor's own colour: DeepSeek-VL's and Janus's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from PIL import Image

from vtr_export.families import ModelFacts
from vtr_export.runtime.images.inputs import Array, ImageInputs, Seen
from vtr_export.runtime.images.picture import Picture
from vtr_export.runtime.images.plain import CLIP_MEAN, ImageFacts, pad_square

PROCESSORS: Final = ("DeepseekVLImageProcessor", "JanusImageProcessor")
_SILENT: Final[Mapping[str, Any]] = {  # what the processor does where its file says nothing
    "size": {"height": 384, "width": 384},
    "min_size": 14,
    "image_mean": CLIP_MEAN,
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "do_convert_rgb": False,
    "do_pad": True,
}


@dataclass(frozen=True)
class SquareFacts:
    """The longer edge becomes ``side`` pixels, the shorter at least ``least``; ``color`` fills."""

    pixels: ImageFacts  # what is done behind that
    side: int
    least: int
    color: tuple[int, ...]

    @property
    def where(self) -> str:
        """The file it was read from."""
        return self.pixels.where

    @classmethod
    def read(cls, kind: str, config: Mapping[str, Any], where: str) -> "SquareFacts":
        """From the JSON of an image processor of class ``kind``."""
        facts = {**_SILENT, **config}
        pixels = ImageFacts.read("SiglipImageProcessor", facts, where)
        size = pixels.resize.exact if pixels.resize is not None else None
        if size is None or size[0] != size[1] or not facts["do_pad"]:
            raise ValueError("images are to be fitted into a square of one size")
        color = tuple(int(value * 255) for value in facts["image_mean"])
        return cls(replace(pixels, resize=None), size[0], int(facts["min_size"]), color)

    def inputs(self, images: Sequence[Picture], facts: ModelFacts) -> ImageInputs:
        """Pixel values, the same for the graph and for transformers."""
        vision, tokens = facts.vision, facts.tokens_per_image
        assert vision is not None, "it has a tower"
        assert tokens is not None, "a family of images of one size"
        values = {"pixel_values": np.stack([self._prepare(image) for image in images])}
        edge = self.side // vision.patch_size
        return ImageInputs(values, values, (Seen(tokens, (1, edge, edge)),) * len(images))

    def _prepare(self, image: Picture) -> Array:
        pixels = self.pixels.decode(image)
        scale = self.side / max(pixels.shape[1:])
        height, width = (max(round(edge * scale), self.least) for edge in pixels.shape[1:])
        fitted = self.pixels.resized(pixels, height, width)
        return self.pixels.prepare(pad_square(fitted, self.color))

    def view(self, inputs: ImageInputs, number: int) -> Image.Image:
        """One image's pixel values as a picture again."""
        return self.pixels.view(inputs, number)
