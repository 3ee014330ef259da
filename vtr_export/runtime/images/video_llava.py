"""Images and videos for two towers: Video-LLaVA's processor, which is CLIP's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from vtr_export.families import ModelFacts
from vtr_export.runtime.images.inputs import ImageInputs
from vtr_export.runtime.images.picture import Picture
from vtr_export.runtime.images.plain import ImageFacts

PROCESSORS: Final = ("VideoLlavaImageProcessor",)


@dataclass(frozen=True)
class TwoTowers:
    """Images are prepared as CLIP's are, and fed beside a blank frame that no token is of.

    A tower takes one at least: ONNX Runtime's attention refuses an empty batch.
    """

    pixels: ImageFacts

    @property
    def where(self) -> str:
        """The file it was read from."""
        return self.pixels.where

    @classmethod
    def read(cls, kind: str, config: Mapping[str, Any], where: str) -> "TwoTowers":
        """From the JSON of an image processor of class ``kind``."""
        return cls(ImageFacts.read(kind, config, where))

    def inputs(self, images: Sequence[Picture], facts: ModelFacts) -> ImageInputs:
        """Pixels of images, a blank frame, and all tokens of the images in order."""
        made = self.pixels.inputs(images, facts)
        pixels = made.feeds["pixel_values"]
        feeds = {
            "pixel_values": pixels,
            "pixel_values_videos": np.zeros_like(pixels[:1]),
            "pack_index": np.arange(made.tokens),
        }
        return ImageInputs(feeds, made.given, made.seen)

    def view(self, inputs: ImageInputs, number: int) -> Image.Image:
        """As CLIP's."""
        return self.pixels.view(inputs, number)
