"""One image as its vision tower saw it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtr_export.reductions import Tower, VisionReduction


@dataclass(frozen=True)
class Reduced:
    """What is left of one image's tokens."""

    features: Tensor  # [K, C]
    source: Tensor | None = None  # [K] which of the tokens before, -1: of several; None: none is
    protected: Tensor | None = None  # [K] bool


@dataclass(frozen=True)
class Seen:
    """Features [N,C] as the projector takes them, and every layer's queries and keys [H,n,d].

    ``before`` are the reductions that came first, ``source`` [N] which of the image's own tokens
    the features are; ``inside`` [M], which ones the tower's last layer had, where one came first
    that works in the tower.
    """

    features: Tensor
    queries: Sequence[Tensor]
    keys: Sequence[Tensor]
    scales: Sequence[float]
    whole: Tower  # before any reduction
    before: Sequence[VisionReduction] = ()
    source: Tensor | None = None
    inside: Tensor | None = None

    @property
    def tower(self) -> Tower:
        """What is left of the tower's tokens by now."""
        tower = self.whole
        for reduction in self.before:
            tower = reduction.leaves(tower)
        return tower

    def query(self, layer: int) -> Tensor:
        """``[H,n,d]``."""
        return self.queries[layer]

    def key(self, layer: int) -> Tensor:
        """``[H,n,d]``."""
        return self.keys[layer]

    def scale(self, layer: int) -> float:
        """The factor of the logits."""
        return self.scales[layer]

    def attention(self, layer: int) -> Tensor:
        """``[H,n,n]`` fp32: probabilities, rows sum to 1."""
        logits = self.queries[layer].float() @ self.keys[layer].float().transpose(1, 2)
        return (logits * self.scales[layer]).softmax(-1)

    def attention_to(self, layer: int, heads: str = "mean") -> Tensor:
        """``[N]``: the class token's look at each token, or the mean of all rows' without one."""
        probability = self.attention(layer)
        each = probability[:, 0, 1:] if self.whole.has_cls else probability.mean(1)
        score = each.mean(0) if heads == "mean" else each.sum(0)
        if self.whole.merge > 1:
            rows, columns, merge = self.whole.grid.rows, self.whole.grid.columns, self.whole.merge
            score = score.view(rows, merge, columns, merge).mean((1, 3)).reshape(-1)
        if not self.before:
            return score
        if self.source is None or bool((self.source < 0).any()):
            raise ValueError("tokens that stand for several have no attention of their own")
        if self.inside is not None and len(score) == len(self.inside):
            return score[(self.source[:, None] == self.inside).int().argmax(1)]
        if len(score) != self.whole.grid.tokens:
            raise ValueError(f"some of what layer {layer} attends to leaves the tower behind it")
        return score[self.source]


def best(score: Tensor, count: int) -> Tensor:
    """The ``count`` tokens with the highest score, ascending; ties go to the lower one."""
    order = torch.sort(score, descending=True, stable=True).indices
    return order[:count].sort().values


def encoder_layers(model: Any) -> nn.ModuleList:
    """The layers of the vision tower."""
    tower = getattr(model.model, "vision_tower", None) or model.model.visual
    for name, module in tower.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "layer"):
            return module
    raise ValueError("the vision tower has no list of layers")
