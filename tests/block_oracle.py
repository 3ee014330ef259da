"""FitPrune's and FiCoCo-L's cuts, from their definitions in numpy and double precision.

``given`` is one row of a batch: what each row of attention gives each vision token, heads reduced.
"""

from dataclasses import dataclass

import numpy as np
from cut_oracle import Array, Call, asking, visible

from vtr_export import ops

BETA = 0.6  # arXiv 2411.17686 v4, appendix 9


@dataclass(frozen=True)
class Given:
    """``by_vision`` [N,N] and ``by_text`` [M,N] of the real vision ``columns`` [N]."""

    columns: list[int]
    by_vision: Array
    by_text: Array


def given(
    call: Call,
    b: int,
    query: Array,
    keys: Array,
    scale: float,
    choice: ops.Choice,
    groups: Array | None = None,
) -> Given:
    """Attention of row ``b``, one softmax after the other."""
    past = call.past.shape[1]
    mask = visible(call.padding, call.current.shape[1], groups)[b, 0]
    columns = [int(c) for c in call.vision[b] if call.current[b, c]]
    group = query.shape[1] // keys.shape[1]

    def shares(row: int) -> Array:
        heads = []
        for h in range(query.shape[1]):
            logits = keys[b, h // group].astype(float) @ query[b, h, row].astype(float) * scale
            if choice.softcap is not None:
                logits = choice.softcap * np.tanh(logits / choice.softcap)
            seen = mask[row]
            odds = np.where(seen, np.exp(np.where(seen, logits - logits[seen].max(), 0)), 0)
            heads.append((odds / odds.sum())[[past + c for c in columns]])
        reduced = np.mean(heads, 0) if choice.heads == "mean" else np.max(heads, 0)
        return np.asarray(reduced)

    asks = asking(call, b, choice.query)
    blocks = (np.array([shares(row) for row in rows]) for rows in (columns, asks))
    by_vision, by_text = (block.reshape(len(block), len(columns)) for block in blocks)
    return Given(columns, by_vision, by_text)


def ranks(given: Given, rule: str) -> Array:
    """[N]: the least are dropped."""
    n, m = len(given.columns), len(given.by_text)
    score = np.zeros(n)
    for i in range(n):
        received = sum(given.by_text[k, i] for k in range(m))
        if rule == "self_cross":  # arXiv 2409.10197: both means over what looks, summed
            score[i] = sum(given.by_vision[j, i] for j in range(n)) / n * received
        elif rule == "redundancy":  # equation 3, dropped from the highest on
            score[i] = -(BETA * sum(given.by_vision[i]) / n - (1 - BETA) * received / m)
        else:
            score[i] = received / m
    return score


def block_scores(
    call: Call,
    query: Array,
    keys: Array,
    scale: float,
    choice: ops.Choice,
    groups: Array | None = None,
) -> Array:
    """[B,V] with -1 for NaN and -2 for pads."""
    score = np.full(call.vision.shape, -2.0)
    for b in range(len(call.vision)):
        found = given(call, b, query, keys, scale, choice, groups)
        ranked = ranks(found, choice.rule)
        real = [e for e, c in enumerate(call.vision[b]) if call.current[b, c]]
        score[b, real] = np.where(np.isnan(ranked), -1, ranked)
    return score


def correlations(given: Given, direct: float) -> Array:
    """[N,N], equation 4: what ties token i to token j; text is asked what it gives to both."""
    n, m = len(given.columns), len(given.by_text)
    bridge = np.zeros((n, n))
    for k in range(m):
        bridge += np.outer(given.by_text[k], given.by_text[k]) / m
    return np.asarray(direct * given.by_vision + (1 - direct) * bridge)


def divided(correlation: Array, kept: list[bool], nearest: int) -> Array:
    """[N,N]: the share of dropped token i that kept token j receives."""
    n = len(kept)
    shares = np.zeros((n, n))
    targets = [j for j in range(n) if kept[j]]
    for i in range(n):
        if not kept[i]:
            best = sorted(targets, key=lambda j: (-correlation[i, j], j))[:nearest]
            whole = sum(correlation[i, j] for j in best)
            for j in best:
                shares[i, j] = correlation[i, j] / whole if whole > 0 else 0
    return shares


def merged(rows: Array, shares: Array) -> Array:
    """[N,D], equation 2: each row is the mean of itself and of what it receives."""
    after = rows.astype(float).copy()
    for j in range(len(rows)):
        received = sum((shares[i, j] * rows[i] for i in range(len(rows))), np.zeros(rows.shape[1]))
        after[j] = (rows[j] + received) / (1 + shares[:, j].sum())
    return after


def clear(correlation: Array, kept: list[bool], nearest: int) -> float:
    """The least distance between a target that is among the nearest and one that is not."""
    gaps = [np.inf]
    for i, stays in enumerate(kept):
        others = sorted((correlation[i, j] for j, takes in enumerate(kept) if takes), reverse=True)
        if not stays and len(others) > nearest:
            gaps.append(others[nearest - 1] - others[nearest])
    return float(min(gaps))
