"""Rotary tables of several positions, in a form that can be traced and narrowed."""

from typing import Any

import torch
from torch import Tensor


def is_bent(decoder: Any) -> bool:
    """Whether several positions are put together by a rule that ``straighten`` knows."""
    return hasattr(getattr(decoder, "rotary_emb", None), "recomposition_frequencies")


def straighten(decoder: Any, count: int = 3) -> None:
    """Replace the rule by which ``decoder`` puts positions of ``count`` components into one table.

    [C, B, S, d/2] → [B, S, d]: each column of the component and the frequency that it belongs to.
    Which those are is asked of transformers' own rule, which may write into slices.
    """
    rotary = decoder.rotary_emb
    tables = (each for name, each in rotary.named_buffers() if name.endswith("inv_freq"))
    width = next(tables).shape[0]  # of every kind of layer, where there are several
    sections = getattr(rotary, "mrope_section", ())
    kinds = sections if isinstance(sections, dict) else {}
    marks = torch.arange(count)[:, None, None, None] * width + torch.arange(width)
    each = [
        rotary.recomposition_frequencies(marks.double(), *kind)[0, 0].long()
        for kind in (*([name] for name in kinds), *([] if kinds else [[]]))
    ]
    chosen = each[0]
    if any(not other.equal(chosen) for other in each):
        raise ValueError("layers of unlike kinds put positions together in unlike ways")
    component, column = chosen // width, chosen % width
    is_twice = chosen[:width].equal(chosen[width:]) and column[:width].equal(torch.arange(width))
    shown = component[:width] if is_twice else component
    for number in range(1, count):
        rotary.register_buffer(f"is_{number}", shown == number, persistent=False)
    rotary.register_buffer("column", column, persistent=False)

    def choose(freq: Tensor, *_: str) -> Tensor:
        parts = freq if is_twice else freq.index_select(-1, rotary.column)
        one = parts[0]
        for number in range(count - 1, 0, -1):
            one = torch.where(getattr(rotary, f"is_{number}"), parts[number], one)
        return torch.cat((one, one), dim=-1) if is_twice else one

    vars(rotary)["recomposition_frequencies"] = choose
