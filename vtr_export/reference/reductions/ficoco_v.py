"""FiCoCo-V (arXiv 2411.17686, section 3): tokens that leave become part of those like them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from vtr_export.reductions import Tower
from vtr_export.reductions.ficoco_v import FiCoCoV
from vtr_export.reference.reductions.seen import Reduced, Seen, encoder_layers

QUANTILE: Final = 0.998


@contextmanager
def inside(reduction: FiCoCoV, model: Any, tower: Tower) -> Iterator[Callable[[Seen], Reduced]]:
    """While it lasts, one image's tokens leave the tower's layers."""
    work = _Work(reduction, tower)
    with ExitStack() as stack:
        for layer in list(encoder_layers(model))[slice(*_span(reduction, tower))]:
            stack.enter_context(_without(layer, work))
        yield lambda seen: Reduced(seen.features, work.left)


def _span(reduction: FiCoCoV, tower: Tower) -> tuple[int, int]:
    """From layer 12 of 24 on, or as said; up to the last that the features come from."""
    first = tower.layers // 2 if reduction.from_layer is None else reduction.from_layer
    return first, tower.layers_run


@contextmanager
def _without(layer: nn.Module, work: "_Work") -> Iterator[None]:
    """A layer in which tokens leave between attention and MLP."""
    own: Any = layer

    def forward(hidden_states: Tensor, attention_mask: Any = None, **rest: Any) -> Tensor:
        normed = own.layer_norm1(hidden_states)
        given, _ = own.self_attn(hidden_states=normed, attention_mask=attention_mask, **rest)
        left = work.step(own.self_attn, normed[0], (hidden_states + given)[0])[None]
        return left + torch.as_tensor(own.mlp(own.layer_norm2(left)))

    before, own.forward = own.forward, forward
    try:
        yield
    finally:
        own.forward = before


class _Work:
    """One image on its way through the tower: which of its tokens are ``left``."""

    def __init__(self, reduction: FiCoCoV, tower: Tower) -> None:
        self.reduction, self.tower = reduction, tower
        self.left = torch.arange(tower.patches.tokens)

    def step(self, attention: Any, normed: Tensor, stream: Tensor) -> Tensor:
        """``stream`` [n,D] with fewer rows."""
        first = int(self.tower.has_cls)
        logits, keys = _compared(attention, normed)
        score = self._penalized(self._score(logits, keys))
        each = self.reduction.drops(self.tower)
        order = torch.sort(score, descending=True, stable=True).indices
        kept, gone = order[:-each].sort().values, order[-each:].sort().values
        share = self._shares(logits[first:, first:][gone][:, kept])
        tokens = stream[first:].float()
        size = 1 + share.sum(0)
        filled = (tokens[kept] + share.T @ tokens[gone]) / size[:, None]
        self.left = self.left[kept]
        return torch.cat((stream[:first], filled.to(stream.dtype)))

    def _score(self, logits: Tensor, keys: Tensor) -> Tensor:
        """Equation 1, negated and weighed as the published code: the lowest leave."""
        first, beta = int(self.tower.has_cls), self.reduction.beta
        asked = logits[first:, first:].mean(1)
        if self.tower.has_cls:
            given = logits[0, 1:]
        else:  # equations 9 to 13
            given = -torch.cosine_similarity(keys.mean(0, keepdim=True), keys, dim=1)
        found: Tensor = beta * given / given.norm() - (1 - beta) * asked / asked.norm()
        return found

    def _penalized(self, score: Tensor) -> Tensor:
        """In each window of the image's grid the lowest of those left goes lower."""
        windows = dict[tuple[int, int], int]()
        for token, position in enumerate(self.left.tolist()):
            row, column = divmod(position, self.tower.patches.columns)
            least = windows.setdefault((row // 2, column // 2), token)
            if score[token] < score[least]:
                windows[row // 2, column // 2] = token
        found = score.clone()
        for token in windows.values():
            found[token] *= 0.5 if score[token] > 0 else 2
        return found

    def _shares(self, logits: Tensor) -> Tensor:
        """``[gone,kept]``: what of each goes where (equation 2); a row's sum is 1."""
        attention = logits.softmax(1)
        if self.reduction.nearest is None:
            goes = attention >= attention.quantile(QUANTILE, dim=1, keepdim=True)
        else:
            order = torch.sort(attention, dim=1, descending=True, stable=True).indices
            goes = torch.zeros_like(attention, dtype=torch.bool)
            goes.scatter_(1, order[:, : self.reduction.nearest], True)
        share = attention * goes
        return share / share.sum(1, keepdim=True).clamp(min=1e-30)


def _compared(attention: Any, normed: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n,n] and keys [n,d] of a layer, each the mean over heads."""
    heads = attention.num_heads
    query, key = (
        nn.functional.linear(normed, part.weight, part.bias)
        .float()
        .view(len(normed), heads, -1)
        .transpose(0, 1)
        for part in (attention.q_proj, attention.k_proj)
    )
    logits = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    return logits.mean(0), key.mean(0)
