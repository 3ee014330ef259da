"""Images in tiles of any resolution: LLaVA-NeXT's and LLaVA-OneVision's processors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, inf
from typing import Any, Final

import numpy as np
from PIL import Image

from vtr_export.errors import ArtifactError, InputError
from vtr_export.families import ModelFacts
from vtr_export.families.section import defaults
from vtr_export.runtime.images.inputs import Array, ImageInputs, Seen
from vtr_export.runtime.images.picture import Picture, Video
from vtr_export.runtime.images.plain import CLIP_MEAN, ImageFacts, pad_square
from vtr_export.runtime.images.tile_tokens import (
    Tokens,
    all_of_first,
    joined,
    newline,
    pooled,
    tiled,
)

PROCESSORS: Final = {  # whose pinpoints they take where their file is silent
    "LlavaNextImageProcessor": "llava_next",
    "LlavaOnevisionImageProcessor": "llava_onevision",
}
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Tiled:
    """One image: the whole of it and then its tiles, [tiles, 3, H, W]; or a video's frames."""

    pixels: Array
    size: Size | None  # of the image, in pixels; None of a video
    tokens: Tokens


@dataclass(frozen=True)
class AnyresFacts:
    """An image is fitted into one of ``pinpoints`` and cut into tiles of ``edge`` pixels."""

    tile: ImageFacts  # what is done to each
    pinpoints: tuple[Size, ...]
    whole: Size  # what the whole image is resized to
    edge: int

    @property
    def where(self) -> str:
        """The file it was read from."""
        return self.tile.where

    @classmethod
    def read(cls, kind: str, config: Mapping[str, Any], where: str) -> "AnyresFacts":
        """From the JSON of an image processor of class ``kind``."""
        silent = defaults()[PROCESSORS[kind]]["derived"]["image_grid_pinpoints"]
        tile = ImageFacts.read(kind, config, where)
        points = config.get("image_grid_pinpoints") or silent
        pinpoints = tuple((int(height), int(width)) for height, width in points)
        if (size := tile.resize) is None:
            raise ValueError("do_resize is false, and tiles have one size")
        whole = size.exact or (size.shortest_edge or 0,) * 2
        return cls(tile, pinpoints, whole, tile.crop[0] if tile.crop else whole[0])

    def inputs(self, images: Sequence[Picture], facts: ModelFacts) -> ImageInputs:
        """All tiles side by side, and which of their tokens an image shows in which order."""
        self._check(facts)
        parts = [self._tiled(image, facts) for image in images]
        tokens = _side_by_side(parts, facts)
        return _together(parts, {"pack_index": tokens.index[:, 0]})

    def _tiled(self, image: Picture, facts: ModelFacts) -> Tiled:
        assert facts.anyres is not None
        pixels = self.tile.decode(image)
        height, width = pixels.shape[1:]
        best = best_resolution((height, width), self.pinpoints)
        fitted = self.tile.resized(pixels, *_fitted((height, width), best))
        whole = self.tile.resized(pixels, *self.whole)
        pieces = [
            self.tile.prepare(one) for one in (whole, *_cut(_centred(fitted, best), self.edge))
        ]
        tiles = best[0] // self.edge, best[1] // self.edge
        tokens = tiled(facts.anyres, tiles, height, width)
        return Tiled(np.stack(pieces), (height, width), tokens)

    def view(self, inputs: ImageInputs, number: int) -> Image.Image:
        """The whole image, without its tiles; InputError for a video."""
        if inputs.seen[number].is_video:
            raise InputError(
                "what is kept of a video cannot be drawn",
                hint="leave --show-kept out; the answer's JSON lists the kept tokens",
            )
        before = sum(not image.is_video for image in inputs.seen[:number])
        return self.tile.picture(inputs.given["pixel_values"][before, 0])

    def _check(self, facts: ModelFacts) -> None:
        """The model counts tiles by its own configuration."""
        assert facts.anyres is not None, "a family of images in tiles"
        assert facts.vision is not None, "it has a tower"
        ours, theirs = (
            (self.edge, self.pinpoints),
            (facts.vision.image_size, facts.anyres.pinpoints),
        )
        if ours != theirs:
            raise ArtifactError(
                f"images are cut into tiles of {ours[0]} pixels at {len(ours[1])} resolutions, "
                f"the model takes {theirs[0]} at {len(theirs[1])} others",
                where=self.where,
                hint="the processor's file belongs to another checkpoint",
            )


@dataclass(frozen=True)
class OnevisionFacts(AnyresFacts):
    """As LLaVA-NeXT; what has too many tokens is shrunk, and only a prompt's lone image has tiles.

    ``counts`` are the images and videos of each prompt; None takes each for the only one of its
    prompt.
    """

    frame: ImageFacts  # what is done to a video's frames
    counts: tuple[int, ...] | None = None
    color: tuple[int, ...] = (0, 0, 0)  # by channel, around an image that is none

    @classmethod
    def read(cls, kind: str, config: Mapping[str, Any], where: str) -> "OnevisionFacts":
        """As LLaVA-NeXT's; a video's frames have facts of their own."""
        base = AnyresFacts.read(kind, config, where)
        mean = config.get("image_mean") or CLIP_MEAN
        return cls(
            **vars(base),
            frame=read_frames(kind, config, where),
            color=tuple(int(share * 255) for share in mean),
        )

    def of_prompts(self, counts: Sequence[int]) -> "OnevisionFacts":
        """For images of several prompts."""
        return replace(self, counts=tuple(counts))

    def inputs(self, images: Sequence[Picture], facts: ModelFacts) -> ImageInputs:
        """Tiles and blended tokens; an image among others is one tile and a newline."""
        self._check(facts)
        stills = self._stills(images)
        alone = [count == 1 for count in stills for _ in range(count)]
        parts = [
            self._video(image, facts)
            if isinstance(image, Video)
            else self._tiled(image, facts)
            if alone.pop(0)
            else self._square(image, facts)
            for image in images
        ]
        tokens = _side_by_side(parts, facts)
        made = _together(parts, {"pack_index": tokens.index, "pack_weight": tokens.weight})
        if not stills:
            return made
        given = {**made.given, "batch_num_images": np.array(stills, np.int64)}
        return replace(made, given=given)

    def _stills(self, images: Sequence[Picture]) -> list[int]:
        """Images of each prompt that has some."""
        ends = np.cumsum([1] * len(images) if self.counts is None else self.counts).tolist()
        prompts = [images[start:end] for start, end in pairwise((0, *ends))]
        counts = [sum(not isinstance(each, Video) for each in prompt) for prompt in prompts]
        return [count for count in counts if count]

    def _square(self, image: Picture, facts: ModelFacts) -> Tiled:
        assert facts.anyres is not None
        pixels = self.tile.decode(image)
        whole = self.tile.prepare(pad_square(pixels, self.color))
        tokens = joined(all_of_first(facts.anyres), newline())
        return Tiled(whole[None], (pixels.shape[1], pixels.shape[2]), tokens)

    def _video(self, video: Video, facts: ModelFacts) -> Tiled:
        assert facts.anyres is not None
        pixels = self.frame.pixel_values(video.frames)
        return Tiled(pixels, None, pooled(facts.anyres, len(pixels)))


def read_frames(kind: str, config: Mapping[str, Any], where: str) -> ImageFacts:
    """What is done to each frame of a video; an image's facts where the file has none.

    Frames are not sampled: those that are given are the sample.
    """
    own = config.get("video_processor") or config
    return ImageFacts.read(kind, {**own, "do_sample_frames": False}, where)


def _side_by_side(parts: Sequence[Tiled], facts: ModelFacts) -> Tokens:
    """The tokens of images whose tiles follow one another."""
    assert facts.anyres is not None
    found, tiles = [], 0
    for part in parts:
        found.append(part.tokens.after(tiles * facts.anyres.side**2))
        tiles += len(part.pixels)
    return joined(*found)


def _together(parts: Sequence[Tiled], pack: Mapping[str, Array]) -> ImageInputs:
    """``given`` has as many tiles for each image: zeros where they have fewer."""
    stills = [part for part in parts if part.size is not None]
    most = max((len(part.pixels) for part in stills), default=0)
    given = {
        "pixel_values": np.stack([_padded(part.pixels, most) for part in stills]),
        "image_sizes": np.array([part.size for part in stills], np.int64),
    } if stills else {}  # fmt: skip
    return ImageInputs(
        {"pixel_values": np.concatenate([part.pixels for part in parts]), **pack},
        given,
        tuple(Seen(len(part.tokens), is_video=part.size is None) for part in parts),
    )


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The one in which most of an image is left, and of these the one that wastes least."""
    height, width = size
    best, most, least = pinpoints[0], 0, inf
    for tall, wide in pinpoints:
        scale = min(wide / width, tall / height)
        left = min(int(width * scale) * int(height * scale), width * height)
        wasted = tall * wide - left
        if left > most or (left == most and wasted < least):
            best, most, least = (tall, wide), left, wasted
    return best


def _fitted(size: Size, into: Size) -> Size:
    """Height and width of an image that fills ``into`` in one of them."""
    (height, width), (tall, wide) = size, into
    down, across = tall / height, wide / width
    if across < down:
        return min(ceil(height * across), tall), wide
    return tall, min(ceil(width * down), wide)


def _centred(pixels: Array, size: Size) -> Array:
    """Zeros around it."""
    gaps = [wanted - now for wanted, now in zip(size, pixels.shape[1:], strict=True)]
    return np.pad(pixels, [(0, 0), *((gap // 2, gap - gap // 2) for gap in gaps)])


def _cut(pixels: Array, edge: int) -> list[Array]:
    """Tiles of ``edge`` by ``edge`` pixels, row by row."""
    _, height, width = pixels.shape
    return [
        pixels[:, y : y + edge, x : x + edge]
        for y in range(0, height, edge)
        for x in range(0, width, edge)
    ]


def _padded(tiles: Array, count: int) -> Array:
    """Zeros for the tiles that others have more."""
    return np.pad(tiles, [(0, count - len(tiles)), (0, 0), (0, 0), (0, 0)])
