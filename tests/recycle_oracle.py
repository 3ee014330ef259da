"""SparseVLM in numpy, from its definition (arXiv 2410.04417, sections 3.2 to 3.4)."""

from dataclasses import dataclass

import numpy as np
from cut_oracle import Array, Call, ranked

from vtr_export.schedule_document import Recycle

CLEAR = 1e-5  # of values around 1: what fp32 does not turn round


@dataclass(frozen=True)
class Clusters:
    """Of one row's rows: its centres, ascending; whose each is; how clearly that was decided."""

    centres: list[int]
    label: list[int]
    margin: float
    is_tied: bool = False  # two are equally dense, to the bit: their order decides


def counts(merge: Recycle, dropped: int) -> tuple[int, int]:
    """How many of ``dropped`` tokens are recycled, and into how many clusters."""
    recycled = min(dropped, int(dropped * merge.share) + 1) if dropped else 0
    return recycled, min(recycled, recycled // merge.each + 1)


def clustered(rows: Array, clusters: int) -> Clusters:
    """DPC-KNN (Rodriguez and Laio's peaks, density of the ``clusters`` nearest, itself among them).

    Of equally dense ones the lower is the denser; all else that ties goes to the lower, too.
    """
    count = len(rows)
    if not count:
        return Clusters([], [], np.inf)
    rows = rows.astype(float)
    squared = ((rows[:, None] - rows[None]) ** 2).mean(-1)
    spread = np.sort(squared, 1)[:, :clusters].mean(1)  # density is exp(-spread)
    order = sorted(range(count), key=lambda i: (spread[i], i))
    away = np.full(count, squared.max())
    for at, i in enumerate(order[1:], 1):
        away[i] = min(squared[i, j] for j in order[:at])
    with np.errstate(divide="ignore"):
        product = np.log(away) / 2 - spread  # of sqrt(away) and density
    best = sorted(range(count), key=lambda i: (-product[i], i))
    centres = sorted(best[:clusters])
    near = squared[:, centres]
    label = [centres.index(i) if i in centres else int(near[i].argmin()) for i in range(count)]
    margins = [np.inf]
    if clusters < count:
        ends = product[best[clusters - 1]], product[best[clusters]]
        margins.append(np.inf if ends[0] == ends[1] else ends[0] - ends[1])
    margins += [
        float(b - a)
        for i, row in enumerate(near)
        if i not in centres
        for a, b in [np.sort(np.append(row, np.inf))[:2]]
    ]
    ties = np.diff(np.sort(spread))
    margins += [float(tie) for tie in ties if tie]  # two that are each other's nearest do tie
    return Clusters(centres, label, min(margins), bool((ties == 0).any()))


@dataclass(frozen=True)
class Recycled:
    """What one row keeps and makes: kept entries, and labels of its vision entries (-1: none)."""

    kept: list[int]
    centres: list[int]  # entries
    label: list[int]
    margin: float


def recycled(score: Array, hidden: Array, keep: int, budget: int, merge: Recycle) -> Recycled:
    """One row: ``score`` [V] with -2 for pads, ``hidden`` [V,D] of its vision tokens."""
    kept = ranked(score, keep, budget)
    left = [e for e in range(len(score)) if e not in kept and score[e] != -2]
    count, clusters = counts(merge, len(left))
    best = sorted(left, key=lambda e: (-score[e], e))
    chosen = sorted(best[:count])
    found = clustered(hidden[chosen], clusters)
    label = [-1] * len(score)
    for entry, number in zip(chosen, found.label, strict=True):
        label[entry] = number
    margin = found.margin
    if count < len(left):
        margin = min(margin, float(score[best[count - 1]] - score[best[count]]))
    return Recycled(kept, [chosen[c] for c in found.centres], label, margin)


def placed(call: Call, b: int, row: Recycled, most: int) -> tuple[list[int], list[int]]:
    """Columns of row ``b`` behind the cut, and where vision tokens stand among them.

    ``most`` clusters stand behind the last vision token; a row of fewer begins with column 0.
    """
    own = set(row.kept)
    vision = [int(c) for c in call.vision[b]]
    alive = {vision[e] for e in own} | (set(range(call.current.shape[1])) - set(vision))
    last = max(vision, default=-1)
    clusters = [vision[e] for e in row.centres]
    short = most - len(clusters)
    front, back = [c for c in sorted(alive) if c <= last], [c for c in sorted(alive) if c > last]
    columns = [0] * short + front + clusters + back
    of_front = [short + at for at, c in enumerate(front) if c in {vision[e] for e in own}]
    first = short + len(front)
    places = [*range(short), *of_front, *range(first, first + len(clusters))]
    return columns, places


def merged(call: Call, b: int, rows: Array, row: Recycled, columns: list[int], most: int) -> Array:
    """The hidden states of row ``b`` behind the cut: those of ``columns``, means for clusters."""
    hidden = rows[columns].astype(float)
    last = int(call.vision[b].max(initial=-1))
    short = most - len(row.centres)
    kept = {int(call.vision[b, e]) for e in row.kept}
    gone = set(call.vision[b].tolist()) - kept
    first = short + sum(c not in gone for c in range(last + 1))
    for number in range(len(row.centres)):
        members = [int(call.vision[b, e]) for e, n in enumerate(row.label) if n == number]
        hidden[first + number] = rows[members].astype(float).mean(0)
    return hidden


def raters(call: Call, embeds: Array) -> tuple[Array, float]:
    """Weights [B,S] of who rates, and how clearly that was decided."""
    weight, margin = np.zeros(call.current.shape), np.inf
    for b, row in enumerate(embeds.astype(float)):
        real = [int(c) for c in call.vision[b] if call.current[b, c]]
        first, last = max(real, default=-1) + 1, call.current.shape[1] - 1
        words = [c for c in range(last + 1) if c == last or (c >= first and call.current[b, c])]
        logits = row[real] @ row[words].T
        odds = np.exp(logits - logits.max(1, keepdims=True, initial=-np.inf))
        mean = (odds / odds.sum(1, keepdims=True)).sum(0) / max(1, len(real))
        if len(words) > 1 and real:
            margin = min(margin, float(np.abs(mean - mean.mean()).min()))
        asks = [c for c, m in zip(words, mean, strict=True) if m > mean.mean() and len(words) > 1]
        asks = asks if asks and real else [last]
        weight[b, asks] = 1 / len(asks)
    return weight, margin
