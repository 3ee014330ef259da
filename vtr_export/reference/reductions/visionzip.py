"""VisionZip (arXiv 2412.04467): dominant tokens, and contextual ones that stand for the rest."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtr_export.reductions import Tower
from vtr_export.reductions.visionzip import VisionZip
from vtr_export.reference.reductions.seen import Reduced, Seen, best, encoder_layers


@contextmanager
def inside(reduction: VisionZip, model: Any, tower: Tower) -> Iterator[Callable[[Seen], Reduced]]:
    """While it lasts, the class token's row of the features' layer is heard."""
    rows = list[Tensor]()

    def note(_: nn.Module, __: Any, given: Any) -> None:
        rows.append((given[0] if isinstance(given, tuple) else given)[0, :1])

    handle = encoder_layers(model)[tower.layers_run - 1].register_forward_hook(note)
    try:
        yield lambda seen: _reduce(reduction, seen, rows[-1])
    finally:
        handle.remove()


def _reduce(reduction: VisionZip, seen: Seen, class_row: Tensor) -> Reduced:
    """The class token if it is one of them, dominant and contextual ones."""
    tokens = seen.tower.grid.tokens
    wanted = reduction.count(seen.tower) - len(reduction.targets(seen.tower))
    shown = seen.tower.has_cls and class_row.shape[1] == seen.features.shape[1] and wanted > 0
    shown = shown and seen.tower.layers_run < seen.tower.layers
    kept = best(seen.attention_to(reduction.layer, "sum"), wanted - int(shown))
    rest = [token for token in range(tokens) if token not in kept.tolist()]
    context = _context(reduction, seen, rest, reduction.count(seen.tower) - wanted)
    row = class_row if shown else seen.features[:0]
    sources = torch.full((len(row),), -1), kept, torch.full((len(context),), -1)
    return Reduced(torch.cat((row, seen.features[kept], context)), torch.cat(sources))


def _context(reduction: VisionZip, seen: Seen, rest: list[int], wanted: int) -> Tensor:
    """``[wanted,C]``: every so many a target, which takes in the mean of those nearest to it."""
    if not wanted:
        return seen.features[:0]
    targets = rest[:: max(1, len(rest) // wanted)][:wanted]
    keys = nn.functional.normalize(_keys(reduction, seen), dim=1)
    members: dict[int, list[int]] = {target: [] for target in targets}
    for token in rest:
        if token not in members:
            members[targets[int((keys[targets] @ keys[token]).argmax())]].append(token)
    wide = seen.features.float()
    found = [wide[target] + (wide[own].mean(0) if own else 0) for target, own in members.items()]
    return torch.stack(found).to(seen.features.dtype)


def _keys(reduction: VisionZip, seen: Seen) -> Tensor:
    """``[N,d]``: means over heads, and over the patches of a token."""
    tower = seen.tower
    keys = seen.key(reduction.layer).float().mean(0)[int(tower.has_cls) :]
    grid, merge = tower.grid, tower.merge
    windows = keys.view(grid.rows, merge, grid.columns, merge, -1)
    return windows.mean((1, 3)).view(grid.tokens, -1)
