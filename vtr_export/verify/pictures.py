"""Pictures a verification shows to both sides: one to ask about, and twenty odd ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 501, 374  # odd and oblong: resizing and cropping have something to do
ODD: Final = (
    ("RGB", 1, 1), ("RGB", 1, 7), ("RGB", 9, 2), ("RGB", 31, 31), ("RGB", 337, 335),
    ("RGB", 97, 224), ("RGB", 640, 203), ("RGB", 223, 225), ("L", 50, 61), ("L", 1, 1),
    ("LA", 33, 20), ("RGBA", 45, 71), ("RGBA", 2, 3), ("P", 64, 47), ("1", 77, 40),
    ("CMYK", 41, 53), ("I;16", 29, 30), ("RGB", 60, 41), ("RGB", 41, 60), ("L", 90, 17),
)  # fmt: skip
ROTATED: Final = {17: 6, 18: 3, 19: 5}  # number of a picture → its EXIF orientation


def draw_picture(file: Path) -> Path:
    """A picture with a photograph's spectrum (noise at every scale), always the same."""
    random = np.random.default_rng(7)
    image = np.zeros((HEIGHT, WIDTH, 3))
    for size in (3, 6, 12, 24, 48, 96, 192):
        noise = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        layer = Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        image += (np.asarray(layer, np.float64) - 127.5) / size**0.5
    image = 127.5 + image * (55 / image.std())
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(file, "PNG")
    return file


def draw_odd_pictures(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files of noise in odd sizes and modes, and what each is."""
    random = np.random.default_rng(11)
    for number, (mode, width, height) in enumerate(ODD):
        noise = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
        turn = ROTATED.get(number)
        file = folder / f"odd_{number}.{'jpg' if turn else 'tiff' if mode == 'CMYK' else 'png'}"
        exif = Image.Exif()
        if turn:
            exif[0x0112] = turn
        _picture(mode, noise).save(file, exif=exif)
        yield f"{mode} {width}x{height}{f' with EXIF orientation {turn}' if turn else ''}", file


def _picture(mode: str, noise: np.ndarray) -> Image.Image:
    """``noise`` ``[H, W, 4]`` in ``mode``."""
    if mode == "RGBA":
        return Image.fromarray(noise)
    if mode == "I;16":
        return Image.fromarray(noise[:, :, :2].copy().view(np.uint16)[:, :, 0])
    return Image.fromarray(noise[:, :, :3].copy()).convert(mode)
