"""MustDrop's vision phase (arXiv 2411.10803, section 3.2): like neighbours become one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from vtr_export.reductions import Tower
from vtr_export.reductions.mustdrop import MustDrop
from vtr_export.reference.reductions.seen import Reduced, Seen, best, encoder_layers

SIDE: Final = 3


@contextmanager
def inside(reduction: MustDrop, model: Any, tower: Tower) -> Iterator[Callable[[Seen], Reduced]]:
    """While it lasts, windows of one image are merged behind a layer of the tower."""
    layer: Any = encoder_layers(model)[reduction.layer]
    before, source, first = layer.forward, list[Tensor](), int(tower.has_cls)

    def forward(*given: Any, **named: Any) -> Any:
        stream = before(*given, **named)
        merged, own = _merged(stream[0, first:], reduction, tower)
        source[:] = [own]
        return torch.cat((stream[0, :first], merged.to(stream.dtype)))[None]

    layer.forward = forward
    try:
        yield lambda seen: Reduced(seen.features, source[0], _key(reduction, seen))
    finally:
        layer.forward = before


def _merged(tokens: Tensor, reduction: MustDrop, tower: Tower) -> tuple[Tensor, Tensor]:
    """The means of merged windows, then all tokens of no such window; and which they were."""
    windows = _windows(tower)
    likeness = torch.stack([_likeness(tokens[window].float()) for window in windows])
    if reduction.windows is None:
        chosen = (likeness >= reduction.similarity).nonzero()[:, 0]
    else:
        chosen = best(likeness, reduction.merged(tower))
    gone = {token for window in chosen.tolist() for token in windows[window]}
    left = torch.tensor([token for token in range(len(tokens)) if token not in gone])
    means = [tokens[windows[window]].float().mean(0).to(tokens) for window in chosen.tolist()]
    source = torch.cat((torch.full((len(chosen),), -1), left.long()))
    return torch.cat([*(mean[None] for mean in means), tokens[left.long()]]), source


def _windows(tower: Tower) -> list[list[int]]:
    """The patches of each whole window."""
    rows, columns = tower.patches.rows, tower.patches.columns
    return [
        [(top + i) * columns + left + j for i in range(SIDE) for j in range(SIDE)]
        for top in range(0, rows - SIDE + 1, SIDE)
        for left in range(0, columns - SIDE + 1, SIDE)
    ]


def _likeness(window: Tensor) -> Tensor:
    """The mean cosine of two tokens of a window ``[9,D]``."""
    cosine = torch.cosine_similarity(window[:, None], window[None], dim=-1)
    apart = ~torch.eye(len(window), dtype=torch.bool)
    return cosine[apart].mean()


def _key(reduction: MustDrop, seen: Seen) -> Tensor:
    """``[K]`` bool: what the last layer's class token looks at most."""
    probability = seen.attention(-1).mean(0)
    score = probability[0, 1:] if seen.whole.has_cls else probability.mean(0)
    flags = torch.zeros(len(score), dtype=torch.bool)
    flags[best(score, reduction.protected(len(score)))] = True
    return flags
