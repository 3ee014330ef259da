"""PruMerge and PruMerge+ (arXiv 2403.15388), token by token as its code goes through them."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtr_export.reductions.prumerge import PruMerge, PruMergePlus
from vtr_export.reference.reductions.seen import Reduced, Seen

NEAREST = 32


def reduce(reduction: PruMerge, seen: Seen) -> Reduced:
    """Kept tokens with their nearest, then one for all that went."""
    score, keys = _class_row(seen), _token_keys(seen)
    x = seen.features
    kept = _kept(reduction, score)
    rows = [_merged(token, x, score, keys) for token in kept]
    gone = [token for token in range(len(x)) if token not in kept]
    rest = (score[gone, None] * x[gone]).sum(0)
    return Reduced(torch.stack([*rows, rest]), torch.tensor([*kept, -1]))


def _merged(token: int, x: Tensor, score: Tensor, keys: Tensor) -> Tensor:
    """What the nearest others weigh goes to a token."""
    others = torch.tensor([other for other in range(len(x)) if other != token], dtype=torch.long)
    likeness = normalize(keys[others], dim=-1) @ normalize(keys[token], dim=-1)
    near = others[likeness.argsort(descending=True, stable=True)[:NEAREST]]
    return x[token] + (score[near, None] * x[near]).sum(0)


def _kept(reduction: PruMerge, score: Tensor) -> list[int]:
    """Best first; then, for PruMerge+, those spread over the image."""
    tokens = len(score)
    if reduction.ratio is None:
        first, third = torch.quantile(score.double(), torch.tensor([0.25, 0.75]).double())
        bound = third + 1.5 * (third - first)
        count = max(1, int((score > bound).sum()))
    else:
        count = max(1, int(tokens * reduction.ratio))
    best: list[int] = score.argsort(descending=True, stable=True)[:count].tolist()
    if not isinstance(reduction, PruMergePlus):
        return best
    if reduction.ratio is None:
        step = max(1, tokens // count // 3)
        return best + [token for token in range(0, tokens - 1, step) if token not in best]
    step = int(1 / reduction.ratio)
    return best + list(range(step // 2, tokens - 1, step))


def _class_row(seen: Seen) -> Tensor:
    """[N] of one softmax over the whole width, or what all rows give without a class token."""
    query, key = (_whole_width(part(-1)).float() for part in (seen.query, seen.key))
    attention = (query @ key.T * query.shape[-1] ** -0.5).softmax(-1)
    row = attention[0, 1:] if seen.whole.has_cls else attention.mean(0)
    return _by_token(row[:, None], seen)[:, 0]


def _token_keys(seen: Seen) -> Tensor:
    """[N,C], without the class token's."""
    return _by_token(_whole_width(seen.key(-1)).float()[seen.whole.has_cls :], seen)


def _whole_width(heads: Tensor) -> Tensor:
    """[n,C] of [H,n,d]: as the projection gave it."""
    return heads.transpose(0, 1).flatten(1)


def _by_token(patches: Tensor, seen: Seen) -> Tensor:
    """Means over the patches that each token covers."""
    grid, merge = seen.whole.grid, seen.whole.merge
    windows = patches.view(grid.rows, merge, grid.columns, merge, -1)
    return windows.mean((1, 3)).flatten(0, 1)
