"""Rotary tables of three positions, in a form that can be traced and narrowed."""

from typing import Any

import torch
from torch import Tensor


def is_bent(decoder: Any) -> bool:
    """Whether three positions are put together by a rule that ``straighten`` knows."""
    return hasattr(getattr(decoder, "rotary_emb", None), "recomposition_frequencies")


def straighten(decoder: Any) -> None:
    """Replace the rule by which ``decoder`` puts three positions into one table.

    [3, B, S, d/2] → [B, S, d]: each column of the component that it belongs to, twice. Which one
    that is, is asked of transformers' own rule, which may write into slices.
    """
    rotary = decoder.rotary_emb
    width = rotary.inv_freq.shape[0]
    components = torch.arange(3.0)[:, None, None, None].expand(3, 1, 1, width).clone()
    chosen = rotary.recomposition_frequencies(components)[0, 0]
    if not chosen[:width].equal(chosen[width:]):
        raise ValueError("the halves of a rotary table differ")
    for number, name in enumerate(("row", "column"), 1):
        rotary.register_buffer(f"is_{name}", chosen[:width] == number, persistent=False)

    def choose(freq: Tensor) -> Tensor:
        time_or_column = torch.where(rotary.is_column, freq[2], freq[0])
        one = torch.where(rotary.is_row, freq[1], time_or_column)
        return torch.cat((one, one), dim=-1)

    vars(rotary)["recomposition_frequencies"] = choose
