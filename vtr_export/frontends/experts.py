"""A mixture of experts that can be traced for any number of tokens: every token through them all.

Experts that were not chosen for a token count nothing. What this costs is said by the facts, whose
``intermediate`` is that of all experts.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from vtr_export.frontends.parts import Stored

BLOCKS: Final = ("Qwen3VLMoeTextSparseMoeBlock",)  # softmax, the best k, their shares sum to 1


class AllExperts(nn.Module):
    """Stands where ``block`` stood; its weights lie as the checkpoint stores them."""

    def __init__(self, block: Any, name: str, tensors: Mapping[str, Stored]) -> None:
        super().__init__()
        self.gate, self.act, self.experts = block.gate, block.experts.act_fn, nn.Module()
        for part, weight in block.experts.named_parameters():
            shape = tensors[f"{name}.experts.{part}"].shape
            stored = nn.Parameter(torch.empty(shape, dtype=weight.dtype), requires_grad=False)
            self.experts.register_parameter(part, stored)
            setattr(self, f"turned_{part}", shape == weight.shape)  # [experts, out, in]

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, D] → [B, S, D]."""
        shares = self._shares(hidden).transpose(1, 2)[..., None]  # [B, experts, S, 1]
        gate, up = (hidden[:, None] @ self._weight("gate_up_proj")).chunk(2, dim=-1)
        each = (self.act(gate) * up) @ self._weight("down_proj")
        mixed: Tensor = (each * shares).sum(1)
        return mixed

    def _shares(self, hidden: Tensor) -> Tensor:
        """[B, S, experts]: zero where an expert was not chosen."""
        logits = functional.linear(hidden, self.gate.weight)
        best, index = logits.softmax(-1, dtype=torch.float32).topk(self.gate.top_k, dim=-1)
        best = (best / best.sum(-1, keepdim=True)).to(logits.dtype)
        is_chosen = index[..., None] == torch.arange(self.gate.num_experts)
        return torch.where(is_chosen, best[..., None], 0.0).sum(-2)

    def _weight(self, part: str) -> Tensor:
        """[experts, in, out]."""
        weight: Tensor = getattr(self.experts, part)
        return weight.transpose(1, 2) if getattr(self, f"turned_{part}") else weight


def open_experts(model: Any, tensors: Mapping[str, Stored], mode: FakeTensorMode) -> None:
    """Replace every mixture of experts in ``model``; ``tensors`` are the checkpoint's, by name."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in BLOCKS:
            parent, _, own = name.rpartition(".")
            with mode:
                setattr(model.get_submodule(parent), own, AllExperts(module, name, tensors))
