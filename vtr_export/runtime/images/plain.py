"""Images of one size: CLIP, SigLIP, ViT and LLaVA processors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vtr_export.errors import ArtifactError, InputError
from vtr_export.families import ModelFacts
from vtr_export.runtime.images.inputs import ImageInputs, Seen
from vtr_export.runtime.images.picture import Picture, load, to_rgb
from vtr_export.runtime.images.resize import Size, read_crop, read_size, target_size

Pixels: TypeAlias = NDArray[Any]  # [channels, height, width]
CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
_OPENAI: Final[Mapping[str, Any]] = {
    "image_mean": CLIP_MEAN,
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_HALF: Final[Mapping[str, Any]] = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_CLIP: Final[Mapping[str, Any]] = {
    **_OPENAI,
    "resample": 3,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "crop_size": {"height": 224, "width": 224},
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
}
_SQUARE: Final[Mapping[str, Any]] = {
    **_HALF,
    "size": {"height": 224, "width": 224},
    "default_to_square": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
}
# what a processor does where its file is silent, read in transformers' classes
PROCESSORS: Final[Mapping[str, Mapping[str, Any]]] = {
    "BlipImageProcessor": {
        **_SQUARE,
        **_OPENAI,
        "size": {"height": 384, "width": 384},
        "resample": 3,
        "do_convert_rgb": True,
    },
    "CLIPImageProcessor": _CLIP,
    "Gemma3ImageProcessor": {**_SQUARE, "resample": 2, "do_convert_rgb": True},
    "IdeficsImageProcessor": {**_SQUARE, **_OPENAI, "resample": 3, "do_convert_rgb": True},
    "LlavaImageProcessor": {**_CLIP, "do_pad": False},
    "LlavaNextImageProcessor": _CLIP,
    "LlavaOnevisionImageProcessor": {
        **_CLIP,
        "size": {"height": 384, "width": 384},
        "do_center_crop": False,
    },
    "VideoLlavaImageProcessor": {**_CLIP, "guesses_axes": True},
    "SiglipImageProcessor": {**_SQUARE, "resample": 3, "do_convert_rgb": True},
    "ViTImageProcessor": {**_SQUARE, "resample": 2},
}
_STEPS = frozenset(
    ("convert_rgb", "pad", "resize", "center_crop", "rescale", "normalize")
)  # each is do_<step> in the file


@dataclass(frozen=True)
class ImageFacts:
    """What happens to an image, in this order; None leaves a step out."""

    convert_rgb: bool
    pad_square: tuple[int, ...] | None  # colour by channel; before the resize
    resize: Size | None
    resample: int  # Pillow's number of the filter
    crop: tuple[int, int] | None  # height, width; zeros are put around what is smaller
    rescale: float | None
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None  # mean, standard deviation
    guesses_axes: bool = False  # takes 1 or 3 rows for the channels, as its processor does
    pad: tuple[int, int] | None = None  # height, width; zeros below and to the right, at the end
    where: str = field(default="", compare=False)

    @classmethod
    def read(cls, kind: str, config: Mapping[str, Any], where: str) -> "ImageFacts":
        """From the JSON of an image processor of class ``kind``; unknown steps are refused."""
        facts = dict(PROCESSORS[kind])
        facts |= {name: value for name, value in config.items() if value is not None}
        for name, value in facts.items():
            if name.startswith("do_") and value and name.removeprefix("do_") not in _STEPS:
                raise ArtifactError(
                    f"the image processor asks for {name}, which is not supported",
                    where=where,
                    hint="export a checkpoint whose images are prepared as CLIP, SigLIP, ViT or "
                    "LLaVA do",
                )
        if kind == "IdeficsImageProcessor" and (side := facts.get("image_size")):
            facts["size"] = {"height": side, "width": side}
        does = {step: bool(facts.get(f"do_{step}")) for step in _STEPS}
        return cls._read(kind, facts, does, where)

    @classmethod
    def _read(
        cls, kind: str, facts: Mapping[str, Any], does: Mapping[str, bool], where: str
    ) -> "ImageFacts":
        mean, std = facts["image_mean"], facts["image_std"]
        square = (does["pad"] and kind == "LlavaImageProcessor") or facts.get("pad2square")
        pad_size = facts.get("pad_size") if does["pad"] and not square else None
        return cls(
            convert_rgb=does["convert_rgb"],
            pad_square=tuple(int(x * 255) for x in _channels(mean)) if square else None,
            resize=read_size(facts["size"], facts["default_to_square"]) if does["resize"] else None,
            resample=int(facts["resample"]),
            crop=read_crop(facts["crop_size"]) if does["center_crop"] else None,
            rescale=float(facts.get("rescale_factor", 1 / 255)) if does["rescale"] else None,
            normalize=(_channels(mean), _channels(std)) if does["normalize"] else None,
            pad=read_crop(pad_size) if pad_size else None,
            guesses_axes=bool(facts.get("guesses_axes")),
            where=where,
        )

    def pixel_values(self, images: Sequence[Picture]) -> Pixels:
        """``[images, channels, height, width]``, float32 unless the facts neither scale nor norm.

        A file is turned as its EXIF says and loses its transparency; an image that Pillow opened
        is taken as it is and laid on white: so does transformers. InputError for what is no
        image, and for images that end in different sizes.
        """
        prepared = [self.prepare(self.decode(image)) for image in images]
        if len(shapes := {one.shape for one in prepared}) > 1:
            sizes = ", ".join(f"{w}x{h}" for _, h, w in sorted(shapes))
            raise InputError(
                f"the images of one call end in different sizes ({sizes})",
                hint="crop them to one shape, or ask about one at a time",
            )
        return np.stack(prepared)

    def decode(self, picture: Picture) -> Pixels:
        """``[3, height, width]`` uint8. InputError for what is no image, or not RGB as it is."""
        image = load(picture)
        pixels = np.array(to_rgb(image) if self.convert_rgb else image)
        if not (self.guesses_axes and len(pixels) in (1, 3)):
            pixels = np.moveaxis(pixels, -1, 0)
        if pixels.ndim != 3 or pixels.dtype != np.uint8 or len(pixels) != 3:
            raise InputError(
                f"the image has mode {image.mode}, and this model's processor converts none",
                where=self.where,
                hint="convert it to RGB first",
            )
        return pixels

    def prepare(self, pixels: Pixels) -> Pixels:
        """What is done to a decoded image, in order."""
        if self.pad_square is not None:
            pixels = pad_square(pixels, self.pad_square)
        if self.resize is not None:
            height, width = target_size(self.resize, pixels.shape[1], pixels.shape[2])
            pixels = self.resized(pixels, height, width)
        if self.crop is not None:
            pixels = _center_crop(pixels, self.crop)
        if self.rescale is not None:
            pixels = (pixels.astype(np.float64) * self.rescale).astype(np.float32)
        if self.normalize is not None:
            pixels = _normalize(pixels, *self.normalize)
        return pixels if self.pad is None else _pad_end(pixels, self.pad)

    def resized(self, pixels: Pixels, height: int, width: int) -> Pixels:
        """By Pillow's filter; InputError for no pixels, and for more than its limit."""
        limit = Image.MAX_IMAGE_PIXELS or math.inf
        if not 0 < height * width <= limit:
            raise InputError(
                f"an image of {pixels.shape[2]}x{pixels.shape[1]} would be resized to "
                f"{width}x{height} pixels",
                hint="crop it to a less extreme shape first",
            )
        image = Image.fromarray(np.moveaxis(pixels, 0, -1))
        resized = image.resize((width, height), resample=Image.Resampling(self.resample))
        return np.moveaxis(np.array(resized), -1, 0)

    def inputs(self, images: Sequence[Picture], facts: ModelFacts) -> ImageInputs:
        """Pixel values, the same for the graph and for transformers."""
        pixels = self.pixel_values(images)
        values = {"pixel_values": pixels}
        return ImageInputs(values, values, (self.seen(pixels, facts),) * len(images))

    def seen(self, pixels: Pixels, facts: ModelFacts) -> Seen:
        """What an image of prepared ``pixels`` becomes."""
        height, width = pixels.shape[-2:]
        tokens = facts.tokens_per_image
        assert tokens is not None, "a family of images of one size"
        assert facts.vision is not None, "it has a tower"
        patch = facts.vision.patch_size * facts.vision.merge
        rows, columns = height // patch, width // patch
        is_laid = facts.vision.latents is None and tokens >= rows * columns
        return Seen(tokens, (1, rows, columns) if is_laid else None)

    def view(self, inputs: ImageInputs, number: int) -> Image.Image:
        """One image's pixel values as a picture again."""
        return self.picture(inputs.feeds["pixel_values"][number])

    def picture(self, prepared: Pixels) -> Image.Image:
        """Pixel values as a picture again."""
        values = np.moveaxis(prepared.astype(np.float64), 0, -1)
        if self.normalize is not None:
            mean, std = self.normalize
            values = values * np.array(std) + np.array(mean)
        if self.rescale is not None:
            values = values / self.rescale
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _channels(value: Any) -> tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3:
        raise ValueError(f"{len(values)} values for 3 channels")
    return tuple(float(x) for x in values)


def pad_square(pixels: Pixels, color: tuple[int, ...]) -> Pixels:
    """The image in the middle of a square of ``color`` (by channel)."""
    channels, height, width = pixels.shape
    if height == width:
        return pixels
    side = max(height, width)
    square = np.empty((channels, side, side), pixels.dtype)
    square[:] = np.array(color, pixels.dtype)[:, None, None]
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = pixels
    return square


def _center_crop(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    missing = [max(0, wanted - now) for wanted, now in zip(size, pixels.shape[1:], strict=True)]
    pixels = np.pad(pixels, [(0, 0), *(((gap + 1) // 2, gap // 2) for gap in missing)])
    top, left = ((now - wanted) // 2 for wanted, now in zip(size, pixels.shape[1:], strict=True))
    return pixels[:, top : top + size[0], left : left + size[1]]


def _normalize(pixels: Pixels, mean: tuple[float, ...], std: tuple[float, ...]) -> Pixels:
    values = pixels.astype(np.float32)
    center, scale = (np.array(x, np.float32)[:, None, None] for x in (mean, std))
    return (values - center) / scale


def _pad_end(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    missing = [length - now for length, now in zip(size, pixels.shape[1:], strict=True)]
    if min(missing) < 0:
        raise InputError(
            f"an image of {pixels.shape[1:]} does not fit into {size}",
            hint="scale the image down first",
        )
    return np.pad(pixels, [(0, 0), (0, missing[0]), (0, missing[1])])
