"""Images and videos for two towers: Video-LLaVA's processors, which are CLIP's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from vtr_export.errors import InputError
from vtr_export.families import ModelFacts
from vtr_export.runtime.images.anyres import read_frames
from vtr_export.runtime.images.inputs import Array, ImageInputs, Seen
from vtr_export.runtime.images.picture import Picture, Video
from vtr_export.runtime.images.plain import ImageFacts

PROCESSORS: Final = ("VideoLlavaImageProcessor",)


@dataclass(frozen=True)
class TwoTowers:
    """Images for one tower and frames for the other, each prepared as CLIP's images are.

    A tower without any gets a blank one that no token is of: ONNX Runtime's attention refuses an
    empty batch.
    """

    image: ImageFacts
    frame: ImageFacts

    @property
    def where(self) -> str:
        """The file it was read from."""
        return self.image.where

    @classmethod
    def read(cls, kind: str, config: Mapping[str, Any], where: str) -> "TwoTowers":
        """From the JSON of an image processor of class ``kind``."""
        return cls(ImageFacts.read(kind, config, where), read_frames(kind, config, where))

    def inputs(self, images: Sequence[Picture], facts: ModelFacts) -> ImageInputs:
        """Pixels of images and of frames, and the order of their tokens."""
        stills = [image for image in images if not isinstance(image, Video)]
        videos = [image for image in images if isinstance(image, Video)]
        pixels = _or_blank(self.image, stills, facts)
        frames = _or_blank(self.frame, [one for video in videos for one in video.frames], facts)
        index = _order(images, len(pixels), facts)
        return ImageInputs(
            {
                "pixel_values": pixels,
                "pixel_values_videos": frames,
                "pack_index": np.concatenate(index),
            },
            {"pixel_values": pixels} if stills else {},
            tuple(
                Seen(len(rows), is_video=True)
                if isinstance(image, Video)
                else self.image.seen(pixels, facts)
                for image, rows in zip(images, index, strict=True)
            ),
        )

    def view(self, inputs: ImageInputs, number: int) -> Image.Image:
        """As CLIP's; InputError for a video."""
        if inputs.seen[number].is_video:
            raise InputError(
                "what is kept of a video cannot be drawn",
                hint="leave --show-kept out; the answer's JSON lists the kept tokens",
            )
        before = sum(not image.is_video for image in inputs.seen[:number])
        return self.image.picture(inputs.feeds["pixel_values"][before])


def _or_blank(kind: ImageFacts, images: Sequence[Picture], facts: ModelFacts) -> Array:
    """Pixels ``[images or 1, channels, height, width]``."""
    if images:
        return kind.pixel_values(images)
    vision = facts.vision
    assert vision is not None
    assert vision.image_size is not None, "of one size"
    return np.zeros((1, vision.channels, vision.image_size, vision.image_size), np.float32)


def _order(images: Sequence[Picture], stills: int, facts: ModelFacts) -> list[Array]:
    """Rows of each image: all images' tokens come first, then the frames', CLS included."""
    tokens, vision = facts.tokens_per_image, facts.vision
    assert tokens is not None, "of one size"
    assert vision is not None
    assert vision.tokens is not None
    still, frame, index = 0, stills * tokens, list[Array]()
    for image in images:
        if isinstance(image, Video):
            index.append(np.arange(frame, frame := frame + len(image.frames) * vision.tokens))
        else:
            index.append(np.arange(still, still := still + tokens))
    return index
