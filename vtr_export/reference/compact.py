"""The cache behind a prefill, from its definition: later layers hold the last stage's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vtr_export.reference.state import Cache
    from vtr_export.schedule import Resolved


def compacted(cache: Cache, kept: Sequence[Tensor], schedule: Resolved) -> Cache:
    """``cache`` after a prefill whose cuts kept ``kept``; as it was without a ``decode`` part.

    arXiv 2411.10803, section 3.4: what any later cut dropped leaves the keys and values of all
    layers behind the first cut. Tokens of earlier calls stay.
    """
    if not schedule.decode:
        return cache
    stages = {len(kept): torch.arange(kept[-1].shape[1]).expand(kept[-1].shape)} if kept else {}
    for stage in range(len(kept) - 1, 0, -1):  # the place of each survivor in an earlier stage
        stages[stage] = kept[stage].gather(1, stages[stage + 1].to(kept[stage].device))
    keys, values, padding = list(cache.keys), list(cache.values), list(cache.padding)
    for layer in range(schedule.layers):
        stage = sum(cut.before_layer <= layer for cut in schedule.cuts)
        if stage in stages:
            past = cache.padding[stage].shape[1] - kept[stage - 1].shape[1]
            keys[layer] = _narrow(cache.keys[layer], past, stages[stage])
            values[layer] = _narrow(cache.values[layer], past, stages[stage])
    for stage in stages:
        past = cache.padding[stage].shape[1] - kept[stage - 1].shape[1]
        own = cache.padding[-1][:, -kept[-1].shape[1] :]
        padding[stage] = torch.cat((cache.padding[stage][:, :past], own), 1)
    return replace(cache, keys=tuple(keys), values=tuple(values), padding=tuple(padding))


def _narrow(states: Tensor | None, past: int, columns: Tensor) -> Tensor | None:
    """``[B, H, P + S, d]`` at its past and ``columns`` [B, S'] of what is behind it."""
    if states is None:
        return None
    rows = [
        torch.cat((row[:, :past], row[:, past + own.to(row.device)]), 1)
        for row, own in zip(states, columns, strict=True)
    ]
    return torch.stack(rows)
