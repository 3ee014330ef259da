"""What is traced of a family's vision encoder, and the inputs it is traced on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from vtr_export.families import ModelFacts


@dataclass(frozen=True)
class Feed:
    """An input of the encoder: an example, and the names of the axes that are not fixed."""

    example: Tensor
    axes: tuple[str | None, ...]

    @property
    def dynamic(self) -> dict[int, Any]:
        """As torch.export wants it."""
        return {axis: Dim(name) for axis, name in enumerate(self.axes) if name is not None}


@dataclass(frozen=True)
class VisionGraph:
    """``forward(model, **feeds)`` gives the features ``[..., D]`` of all images, in order.

    ``model`` is transformers'; the feeds' names are the graph's inputs, which the runtime's
    ``ImageKind`` of the family makes.
    """

    forward: Callable[..., Tensor]
    feeds: Callable[[ModelFacts, torch.dtype], Mapping[str, Feed]]
