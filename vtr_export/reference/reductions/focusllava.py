"""FocusLLaVA's vision-guided sampler (arXiv 2411.14228), block by block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, max_pool2d

from vtr_export.reductions import Tower
from vtr_export.reductions.focusllava import FocusLLaVA
from vtr_export.reference.reductions.seen import Reduced, Seen

ROUTER = "vision_sampler.router"
WINDOWS = (4, 2, 1)  # the router's scales, coarsest first


@contextmanager
def inside(reduction: FocusLLaVA, model: Any, tower: Tower) -> Iterator[Callable[[Seen], Reduced]]:
    """Behind the tower; the router's weights lie beside the model's own."""
    del reduction, tower  # has no numbers; what is left of the tower is said by ``Seen``
    router: nn.Module = model.get_submodule(ROUTER)
    yield lambda seen: _reduce(seen, router)


def _reduce(seen: Seen, router: nn.Module) -> Reduced:
    """Row by row, each block at the scale its router takes."""
    grid = seen.tower.grid
    image = seen.features.view(grid.rows, grid.columns, -1)
    numbers = torch.arange(grid.tokens).view(grid.rows, grid.columns)
    features, source = [], []
    for top in range(0, grid.rows, 4):
        for left in range(0, grid.columns, 4):
            block = image[top : top + 4, left : left + 4]
            window = WINDOWS[int(_logits(block, router).argmax())]
            features.append(_maxima(block, window))
            own = numbers[top : top + 4, left : left + 4].flatten()
            source.append(own if window == 1 else torch.full((len(features[-1]),), -1))
    return Reduced(torch.cat(features), torch.cat(source))


def _logits(block: Tensor, router: nn.Module) -> Tensor:
    """One for each scale."""
    weights = {name: weight.float() for name, weight in router.named_parameters()}
    mean = block.float().mean((0, 1))
    active = gelu(linear(mean, weights["0.weight"], weights["0.bias"]))
    return linear(active, weights["2.weight"], weights["2.bias"])


def _maxima(block: Tensor, window: int) -> Tensor:
    """``[tokens, C]``, row by row."""
    pooled = max_pool2d(block.permute(2, 0, 1), window, ceil_mode=True)
    return pooled.permute(1, 2, 0).flatten(0, 1)
