"""SparseVLM, from its definition: raters, and dropped tokens as means of their clusters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vtr_export.reference.cut import Streams
from vtr_export.schedule_document import Recycle

FAR = 1e30  # a squared distance that none exceeds


@dataclass(frozen=True)
class Recycled:
    """What a cut makes of its streams, clusters behind the last vision token of each row.

    Clusters are counted from the end of the vision index, in the order of their centres; a row of
    fewer than another begins with pads instead.
    """

    kept: Tensor  # [B, S'] columns; a cluster's is its centre's
    vision: Tensor  # [B, V'] of S'
    hidden: Tensor  # [B, S', D]
    label: Tensor  # [B, V] the cluster of each vision token; -1: of none
    is_kept: Tensor  # [B, V] bool: as itself
    margin: Tensor  # [B] how clearly clusters were decided


@dataclass(frozen=True)
class _Row:
    """Of one row: entries of its vision index that stay, and clusters by the entries of theirs."""

    kept: Tensor
    clusters: list[tuple[int, list[int]]]  # a centre and its members
    margin: float


def raters_of(embeds: Tensor, mask: Tensor, vision: Tensor, drafted: int = 0) -> Tensor:
    """``[B, S]`` bool: text that image tokens attend to above the mean (arXiv 2410.04417, 3.2).

    Of ``softmax(V T^t)`` over the text behind the last vision token, the mean over vision tokens.
    If none exceeds the mean, the last column rates. The last ``drafted`` are an answer and do not.
    """
    rates = torch.zeros_like(mask, dtype=torch.bool)
    for row, columns in enumerate(vision):
        seen = columns[mask[row, columns] != 0]
        is_text = mask[row, : mask.shape[1] - drafted] != 0
        is_text[: int(seen[-1]) + 1 if len(seen) else 0] = False
        is_text[-1] = True
        text = is_text.nonzero()[:, 0]
        image, words = embeds[row, seen].float(), embeds[row, text].float()
        given = (image @ words.T).softmax(-1).mean(0)
        chosen = text[given > given.mean()]
        rates[row, chosen if len(chosen) else text[-1:]] = True
    return rates


def recycle(score: Tensor, chosen: Tensor, streams: Streams, merge: Recycle) -> Recycled:
    """Keep the entries ``chosen`` ``[B, k]``; of the dropped, the best become means of clusters.

    arXiv 2410.04417, 3.4. Its code appends clusters by their peaks; here they stand in the order
    of their centres, whose positions they have where these are not numbered anew.
    """
    rows = [_row(score[b], chosen[b], streams, b, merge) for b in range(len(score))]
    most = max(len(row.clusters) for row in rows)
    laid = [_lay(row, streams, b, most) for b, row in enumerate(rows)]
    kept, vision, hidden, label, is_kept = (torch.stack(part) for part in zip(*laid, strict=True))
    margin = torch.tensor([row.margin for row in rows], device=score.device)
    return Recycled(kept, vision, hidden, label, is_kept, margin)


def _row(score: Tensor, kept: Tensor, streams: Streams, b: int, merge: Recycle) -> _Row:
    is_left = streams.is_real()[b].clone()
    is_left[kept] = False
    left = is_left.nonzero()[:, 0]
    count, clusters = merge.of(len(left))
    order = score[left].sort(descending=True, stable=True)
    entries = left[order.indices[:count]].sort().values
    ends = order.values[count - 1 : count + 1] if count else order.values[:0]
    margin = float(ends[0] - ends[1]) if len(ends) == 2 else torch.inf
    rows = streams.hidden[b, streams.vision[b, entries]]
    found, clear = peaks(rows, clusters) if clusters else ([], torch.inf)
    named = [(int(entries[c]), [int(entries[m]) for m in members]) for c, members in found]
    return _Row(kept, named, min(margin, clear))


def peaks(rows: Tensor, clusters: int) -> tuple[list[tuple[int, list[int]]], float]:
    """DPC-KNN of ``rows`` ``[M, D]``: centres, ascending, with their members; and how clearly.

    Density exp(-mean d^2) of the ``clusters`` nearest, itself among them, with d^2 the mean square
    difference; a centre has a large product of density and distance to the nearest denser one.
    Of ties the lower goes first; its code adds noise instead. What is no number is no distance.
    """
    squared = torch.stack([((rows - row).float() ** 2).mean(-1) for row in rows])
    squared = squared.nan_to_num(0, FAR).clamp(max=FAR)
    spread = squared.sort(1).values[:, :clusters].mean(1)
    order = spread.sort(stable=True).indices.tolist()
    away = squared.max().repeat(len(rows))
    for at, i in enumerate(order[1:], 1):
        away[i] = squared[i, order[:at]].min()
    # of density and distance the logarithm, which stays a number where density is 0 in fp32
    product = torch.where(away > 0, away.log() / 2 - spread, -torch.inf)
    best = product.sort(descending=True, stable=True)
    centres = best.indices[:clusters].sort().values.tolist()
    members = {c: [c] for c in centres}
    for i in set(range(len(rows))) - set(centres):
        members[min(centres, key=lambda c: (float(squared[i, c]), c))].append(i)
    ends = best.values[clusters - 1 : clusters + 1]
    is_decided = len(ends) < 2 or bool(ends[0] == ends[1])  # two that are each other's nearest
    clear = torch.inf if is_decided else float(ends[0] - ends[1])
    return [(c, sorted(members[c])) for c in centres], clear


def _lay(row: _Row, streams: Streams, b: int, most: int) -> tuple[Tensor, ...]:
    """One row of :class:`Recycled`, but its margin."""
    vision, length, short = streams.vision[b], streams.mask.shape[1], most - len(row.clusters)
    alive = torch.ones(length, dtype=torch.bool, device=vision.device)
    alive[vision] = False
    alive[vision[row.kept]] = True
    behind = int(vision[-1]) + 1 if len(vision) else 0
    front, back = alive[:behind].nonzero()[:, 0], alive[behind:].nonzero()[:, 0] + behind
    centres = vision[[centre for centre, _ in row.clusters]]
    kept = torch.cat((front.new_zeros(short), front, centres, back))
    is_vision = torch.zeros(length, dtype=torch.bool, device=vision.device)
    is_vision[vision] = True
    first = short + len(front)
    at = torch.arange(len(kept), device=kept.device)
    is_place = (at < first + len(centres)) & (is_vision[kept] | (at < short))
    hidden = streams.hidden[b, kept].clone()
    label = torch.full_like(vision, -1)
    for number, (_, members) in enumerate(row.clusters):
        mean = streams.hidden[b, vision[members]].float().mean(0)
        hidden[first + number] = mean.to(hidden.dtype)
        label[members] = short + number
    is_kept = torch.zeros_like(vision, dtype=torch.bool)
    is_kept[row.kept] = True
    return kept, is_place.nonzero()[:, 0], hidden, label, is_kept
