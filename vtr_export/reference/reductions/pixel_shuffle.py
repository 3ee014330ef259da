"""Pixel shuffle (InternVL, arXiv 2404.16821), step by step, and the projector behind it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from vtr_export.reductions import Tower
from vtr_export.reductions.pixel_shuffle import PixelShuffle
from vtr_export.reference.reductions.seen import Reduced, Seen


@contextmanager
def inside(reduction: PixelShuffle, model: Any, _: Tower) -> Iterator[Callable[[Seen], Reduced]]:
    """While it lasts, another projector is in the place of the model's."""
    own, towers = model.get_submodule("vision_sampler.pixel_shuffle"), list[Tower]()

    def project(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> Tensor:
        wide = _shuffled(given[0], towers[-1], reduction.factor)
        normed = layer_norm(wide, wide.shape[-1:], own.layer_norm.weight, own.layer_norm.bias)
        active = gelu(linear(normed, own.linear_1.weight, own.linear_1.bias))
        return linear(active, own.linear_2.weight, own.linear_2.bias)

    def left(seen: Seen) -> Reduced:
        towers.append(seen.tower)
        return Reduced(seen.features)

    handle = model.model.multi_modal_projector.register_forward_hook(project)
    try:
        yield left
    finally:
        handle.remove()


def _shuffled(features: Tensor, tower: Tower, factor: int) -> Tensor:
    """``[1,K,C']``: columns fold into the width first, then rows; then both swap back."""
    rows, columns, width = tower.grid.rows, tower.grid.columns, features.shape[-1]
    image = features.reshape(1, rows, columns // factor, width * factor)
    turned = image.permute(0, 2, 1, 3)
    folded = turned.reshape(1, columns // factor, rows // factor, width * factor**2)
    return folded.permute(0, 2, 1, 3).reshape(1, -1, width * factor**2)
