"""What a cut computes, written from its definition in numpy, and random calls to compute it on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from vtr_export import ops

Array = np.ndarray[Any, Any]
FAR = 1e30  # above every threshold
FEW = st.integers(0, 6)


@dataclass(frozen=True)
class Call:
    """What a cut sees of one call."""

    past: Array  # [B,P] 1 = real
    current: Array  # [B,S]
    vision: Array  # [B,V] ascending columns; the row's leftmost pads first

    @property
    def padding(self) -> Array:
        return np.concatenate([self.past, self.current], 1)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, P, S, V."""
        return (*self.past.shape, self.current.shape[1], self.vision.shape[1])

    @property
    def counts(self) -> Array:
        """Real vision tokens of each row."""
        return np.take_along_axis(self.current, self.vision, 1).sum(1)

    def hidden(self, dtype: Any = np.float32) -> Array:
        """[B,S,2] rows that tell where they stand."""
        rows = np.arange(self.current.shape[1])
        return np.stack(
            [np.stack([rows, rows + 100 * b], 1) for b in range(len(self.past))]
        ).astype(dtype)


@st.composite
def calls(draw: st.DrawFn, tokens: st.SearchStrategy[int] = FEW, size: int = 1) -> Call:
    """Left-padded rows of their own text and (in multiples of ``size``) vision tokens."""
    batch, past = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    most = draw(tokens)
    vision = [size * draw(st.integers(0, most // size)) for _ in range(batch - 1)] + [most]
    text = [draw(st.integers(1, 5)) for _ in range(batch)]
    length = max(text) + most
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    current = np.zeros((batch, length), np.int64)
    index = np.zeros((batch, most), np.int64)
    for b in range(batch):
        pads = length - text[b] - vision[b]
        current[b, pads:] = 1
        chosen = np.sort(rng.permutation(np.arange(pads, length - 1))[: vision[b]])
        index[b] = np.concatenate([np.arange(most - vision[b]), chosen])
    return Call(rng.integers(0, 2, (batch, past)), current, index)


def visible(padding: Array, rows: int, groups: Array | None = None) -> Array:
    """What the last ``rows`` see; ``groups`` are of all rows of this call."""
    batch, total = padding.shape
    new = rows if groups is None else groups.shape[1]
    numbers = np.zeros((batch, total), np.int64)
    numbers[:, total - new :] = 0 if groups is None else groups
    mask = np.zeros((batch, 1, rows, total), bool)
    for b, i, t in np.ndindex(batch, rows, total):
        at = total - rows + i
        together = numbers[b, at] > 0 and numbers[b, at] == numbers[b, t]
        mask[b, 0, i, t] = (t <= at and padding[b, t] == 1) or t == at or together
    return mask


def asking(call: Call, b: int, query: str) -> list[int]:
    """The query rows of row ``b``."""
    last = call.current.shape[1] - 1
    if query == "last":
        return [last]
    real = [int(c) for c in call.vision[b] if call.current[b, c]]
    first = max(real) + 1 if real else 0
    return [i for i in range(last + 1) if i == last or (i >= first and call.current[b, i])]


def asked(
    call: Call,
    query: Array,
    keys: Array,
    scale: float,
    choice: ops.Choice,
    groups: Array | None = None,
    raters: Array | None = None,
) -> list[Array]:
    """What each asking row gives all keys, [R,T] of each row of the batch, in double precision.

    ``raters`` [B,S] above 0, if any, ask in place of those that the choice says.
    """
    mask = visible(call.padding, call.current.shape[1], groups)
    group, found = query.shape[1] // keys.shape[1], []
    for b in range(len(call.past)):
        rows = []
        rates = [] if raters is None else np.flatnonzero(raters[b])
        for i in rates if len(rates) else asking(call, b, choice.query):
            heads = []
            for h in range(query.shape[1]):
                logits = keys[b, h // group].astype(float) @ query[b, h, i].astype(float) * scale
                if choice.softcap is not None:
                    logits = choice.softcap * np.tanh(logits / choice.softcap)
                seen = mask[b, 0, i]
                odds = np.where(seen, np.exp(np.where(seen, logits - logits[seen].max(), 0)), 0)
                heads.append(odds / odds.sum())
            rows.append(np.mean(heads, 0) if choice.heads == "mean" else np.max(heads, 0))
        found.append(np.array(rows))
    return found


def scored(
    call: Call,
    query: Array,
    keys: Array,
    scale: float,
    choice: ops.Choice,
    groups: Array | None = None,
    raters: Array | None = None,
) -> Array:
    """[B,V] in double precision."""
    batch, past, _, tokens = call.sizes
    score = np.zeros((batch, tokens))
    for b, rows in enumerate(asked(call, query, keys, scale, choice, groups, raters)):
        mean = np.mean(rows, 0)
        for e, column in enumerate(call.vision[b]):
            value = mean[past + column]
            score[b, e] = -2 if not call.current[b, column] else -1 if np.isnan(value) else value
    return score


def above(
    call: Call, rows: list[Array], whole: float, single: float, protected: Array
) -> tuple[Array, float]:
    """[B,V] how far above MustDrop's thresholds, and the least distance from one of them.

    A token is dropped whose share of what all vision tokens get is below ``whole``, and whom no
    row gives ``single``: below 1. One that is protected is above all; a pad is -2.
    """
    past, found, nearest = call.past.shape[1], np.full(call.vision.shape, -2.0), np.inf
    for b, given in enumerate(rows):
        columns = [c for c in call.vision[b] if call.current[b, c]]
        all_given = sum(given[:, past + c].sum() for c in columns)
        for e, column in enumerate(call.vision[b]):
            if not call.current[b, column]:
                continue
            mine = given[:, past + column]
            of_whole = mine.sum() / all_given / whole if whole else FAR
            of_single = mine.max() / single if single else FAR
            found[b, e] = 2 * FAR if protected[b, e] else max(of_whole, of_single)
            nearest = min(nearest, abs(max(of_whole, of_single) - 1))
    return found, nearest


def ranked(score: Array, keep: int, budget: int) -> list[int]:
    """Entries of one row that survive: best first, lower index first; then leftmost pads.

    Beyond its last entry: where the row has no pad left.
    """
    order = sorted(range(len(score)), key=lambda e: (-score[e], e))
    pads = [e for e in range(len(score)) if score[e] == -2]
    return [*order[:budget], *(pads + keep * [len(score)])[: keep - budget]][:keep]


def selected(call: Call, chosen: list[list[int]]) -> tuple[Array, Array]:
    """Surviving columns of each row, and where vision tokens stand among them.

    The last column stands in front for an entry that does not exist.
    """
    indices, places = [], []
    for b, entries in enumerate(chosen):
        kept = {int(call.vision[b, e]) for e in entries if e < call.vision.shape[1]}
        short, last = len(entries) - len(kept), call.current.shape[1] - 1
        alive = [c for c in range(last + 1) if c in kept or c not in call.vision[b]]
        indices.append([last] * short + alive)
        places.append(
            [at for at, column in enumerate([-1] * short + alive) if column in {-1, *kept}]
        )
    return np.array(indices), np.array(places, np.int64).reshape(len(chosen), -1)
