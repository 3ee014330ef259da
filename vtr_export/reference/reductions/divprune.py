"""DivPrune (arXiv 2503.02175): a greedy answer to the max-min diversity problem."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vtr_export.reductions import Tower
from vtr_export.reductions.divprune import DivPrune
from vtr_export.reference.reductions.seen import Reduced, Seen


@contextmanager
def inside(reduction: DivPrune, model: Any, _: Tower) -> Iterator[Callable[[Seen], Reduced]]:
    """Distances are those of projected features."""
    project = model.model.multi_modal_projector.forward  # whose hooks reduce
    yield lambda seen: _reduce(reduction, seen, project(seen.features[None])[0])


def _reduce(reduction: DivPrune, seen: Seen, projected: Tensor) -> Reduced:
    """In raster order."""
    unit = torch.nn.functional.normalize(projected.float(), dim=1)
    kept = _farthest(1 - unit @ unit.T, reduction.count(seen.tower))
    return Reduced(seen.features[kept], kept)


def _farthest(distance: Tensor, wanted: int) -> Tensor:
    """Each as far as can be from all that came before."""
    if not wanted:
        return torch.zeros(0, dtype=torch.int64)
    alone = distance.clone().fill_diagonal_(torch.inf).min(1).values
    chosen = [int(alone.argmax())]
    while len(chosen) < wanted:
        least = distance[chosen].min(0).values
        least[chosen] = -torch.inf
        chosen.append(int(least.argmax()))
    return torch.tensor(sorted(chosen))
