"""Image files, their content, and what Pillow opened: decoded to the last pixel."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeAlias

from PIL import Image, ImageOps, UnidentifiedImageError

from vtr_export.errors import InputError

Still: TypeAlias = str | Path | bytes | Image.Image  # a file, its content, or what Pillow opened


@dataclass(frozen=True)
class Video:
    """Frames in order; the model sees each of them."""

    frames: tuple[Still, ...]

    @classmethod
    def of_folder(cls, folder: Path) -> "Video":
        """The image files in a folder, by name. InputError where there are none."""
        known = Image.registered_extensions()
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        frames = tuple(file for file in files if file.suffix.lower() in known)
        if not frames:
            hint = "give a folder of its frames as image files, which are taken by name"
            raise InputError("no folder with frames of a video", where=str(folder), hint=hint)
        return cls(frames)


Picture: TypeAlias = Still | Video


def load(image: Picture) -> Image.Image:
    """An image decoded to its last pixel. InputError for what is none, truncated or too large."""
    if isinstance(image, Video):
        hint = "give its frames as images, or a model that takes videos"
        raise InputError("this model takes no videos", hint=hint)
    if isinstance(image, Image.Image):
        with _decoding(str(getattr(image, "filename", ""))):
            image.load()
        return image
    if isinstance(image, str | Path) and not Path(image).is_file():
        hint = "give the path of an image file; addresses are not fetched"
        raise InputError("no such image file", where=str(image), hint=hint)
    where = f"{len(image)} bytes" if isinstance(image, bytes) else str(image)
    with (
        _decoding(where),
        Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file,
    ):
        _check_pixels(file, where)
        return ImageOps.exif_transpose(file).convert("RGB")


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    """What a damaged file makes a decoder stumble over, as InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        _refuse_file(error, where)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, transparency laid on white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _check_pixels(image: Image.Image, where: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise InputError(
            f"{image.width}x{image.height} pixels are more than Pillow's limit of {limit}",
            where=where,
            hint="scale the image down first",
        )


def _refuse_file(error: Exception, where: str) -> NoReturn:
    if isinstance(error, Image.DecompressionBombError):
        message, hint = f"too many pixels: {error}", "scale the image down first"
    elif isinstance(error, UnidentifiedImageError):
        message, hint = "not an image, or of a format Pillow does not know", "try a PNG or JPEG"
    else:
        message, hint = f"the image is damaged: {error}", "copy or download it again"
    raise InputError(message, where=where, hint=hint) from error
