"""What a vision encoder is fed for some images, whatever the family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vtr_export.families import ModelFacts
from vtr_export.runtime.images.picture import Picture

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Seen:
    """One image among the tokens: how many it becomes, and how they lie.

    ``grid`` is frames, rows and columns of tokens; None where they lie in no single grid (tiles).
    ``tiles`` are rows and columns of tiles, for those who write them into a prompt.
    """

    tokens: int
    grid: tuple[int, int, int] | None = None
    tiles: tuple[int, int] | None = None
    is_video: bool = False


@dataclass(frozen=True)
class ImageInputs:
    """The images of one call, in the order of their places.

    ``feeds`` are the vision encoder's inputs by name. ``given`` is what transformers' processor
    gives its own model for the same images: the same values under transformers' names, of still
    images only.
    """

    feeds: Mapping[str, Array]
    given: Mapping[str, Array]
    seen: tuple[Seen, ...]

    @property
    def tokens(self) -> int:
        """Vision tokens of all images."""
        return sum(image.tokens for image in self.seen)


class ImageKind(Protocol):
    """A way to prepare images, read from a checkpoint's processor files."""

    @property
    def where(self) -> str:
        """The file it was read from."""
        ...

    def inputs(self, images: Sequence[Picture], facts: ModelFacts) -> ImageInputs:
        """At least one image; InputError for what cannot be prepared."""
        ...

    def view(self, inputs: ImageInputs, number: int) -> Image.Image:
        """Image ``number`` as the model sees it."""
        ...


@runtime_checkable
class ByPrompt(Protocol):
    """A way that depends on how many images a prompt has."""

    def of_prompts(self, counts: Sequence[int]) -> ImageKind:
        """For the images of prompts that have ``counts`` of them, in order."""
        ...


def repeated(inputs: ImageInputs, times: int) -> ImageInputs:
    """The same images several times; only for feeds that lie side by side."""
    return ImageInputs(
        {name: np.concatenate([values] * times) for name, values in inputs.feeds.items()},
        {name: np.concatenate([values] * times) for name, values in inputs.given.items()},
        inputs.seen * times,
    )
