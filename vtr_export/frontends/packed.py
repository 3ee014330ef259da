"""Attention of a vision tower whose patches all lie in one row, in groups that see themselves."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME: Final = "vtr_flash"  # transformers hands cu_seqlens on where "flash" is in the name


@dataclass(frozen=True)
class Groups:
    """Rows of patch numbers; stands where transformers' towers take ``cu_seqlens``."""

    index: Tensor  # [groups * longest], gaps show patch 0
    visible: Tensor  # [groups, 1, longest, longest] no gaps
    places: Tensor  # [patches] where each lies in ``index``

    @classmethod
    def of(cls, index: Tensor, places: Tensor) -> "Groups":
        """From ``index`` [groups, longest], where -1 is a gap."""
        real = (index >= 0)[:, None, None, :]
        visible = real.expand(-1, 1, index.shape[1], -1)
        return cls(index.clamp(min=0).flatten(), visible, places.flatten())

    def part(self, states: Tensor) -> Tensor:
        """[1, heads, patches, d] → [groups, heads, longest, d]."""
        rows = states[0].transpose(0, 1)[self.index]
        groups, _, longest, _ = self.visible.shape
        return rows.reshape(groups, longest, *rows.shape[1:]).transpose(1, 2)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Groups,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """One ONNX ``Attention`` over the groups; [patches, heads, d]."""
    groups = cu_seq_lens_q
    query, key, value = (groups.part(states) for states in (query, key, value))
    mixed = torch.onnx.ops.attention(query, key, value, groups.visible, scale=scaling)[0]
    return mixed.transpose(1, 2).flatten(0, 1)[groups.places], None


AttentionInterface.register(NAME, attention)
