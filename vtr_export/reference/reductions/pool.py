"""Pooling of a grid of tokens, by torch's own."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vtr_export.reductions import Tower
from vtr_export.reductions.pool import Pool
from vtr_export.reference.reductions.seen import Reduced, Seen


@contextmanager
def inside(reduction: Pool, model: Any, _: Tower) -> Iterator[Callable[[Seen], Reduced]]:
    """While it lasts, what the projector gives is pooled; or what it is given."""
    towers = list[Tower]()

    def pool(_: nn.Module, __: Any, given: Tensor) -> Tensor:
        return _pooled(reduction, given[0], towers[-1])[None] if reduction.projects else given

    def left(seen: Seen) -> Reduced:
        towers.append(seen.tower)
        if reduction.projects:
            return Reduced(seen.features)
        return Reduced(_pooled(reduction, seen.features, seen.tower))

    handle = model.model.multi_modal_projector.register_forward_hook(pool)
    try:
        yield left
    finally:
        handle.remove()


def _pooled(reduction: Pool, rows: Tensor, tower: Tower) -> Tensor:
    """``[K,C]`` of ``[N,C]``."""
    sides = tower.grid.rows, tower.grid.columns
    planes = rows.T.reshape(1, -1, *sides)
    size, factor, mean = reduction.grid, reduction.factor, reduction.kind == "average"
    if reduction.kind == "bilinear":
        size = size or (math.ceil(sides[0] / factor), math.ceil(sides[1] / factor))
        small = nn.functional.interpolate(planes, size=size, mode="bilinear")
    elif size is not None:
        by_size: Any = nn.AdaptiveAvgPool2d if mean else nn.AdaptiveMaxPool2d
        small = by_size(size)(planes)
    else:
        by_factor: Any = nn.AvgPool2d if mean else nn.MaxPool2d
        small = by_factor(factor)(planes)
    return small[0].flatten(1).T
