"""One cut, from the definition: score the vision tokens, select, find the survivors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from vtr_export.reference.layers import Attention
from vtr_export.schedule import Keep, Resolved

Budget: TypeAlias = tuple[int, list[int]]  # vision columns, real vision tokens of each row
NAN_SCORE, PAD_SCORE = -1.0, -2.0
MISSING = -1  # an entry that nothing fills


@dataclass(frozen=True)
class Streams:
    """Everything with a token axis that crosses a cut."""

    hidden: Tensor  # [B, S, D]
    mask: Tensor  # [B, S] 1 = real
    positions: Tensor  # [B, S] or [3, B, S]: what the decoder is given as position_ids
    vision: Tensor  # [B, V] columns of the vision tokens, ascending; pads come first
    groups: Tensor  # [B, S] tokens of one number see each other; 0 is no group
    drafted: int = 0  # last columns that belong to the answer
    planes: tuple[Tensor, ...] = ()  # [B, S, D] each: added to what leaves layer 0, 1, …
    layered: tuple[Tensor, ...] = ()  # [B, S, P] each: handed to layer 0, 1, … beside its rows
    protected: Tensor | None = None  # [B, S] bool: vision tokens that no cut may drop; None: none
    raters: Tensor | None = None  # [B, S] bool: text that ranks, where not all of a kind does

    def rows(self, at: Tensor) -> "Streams":
        """Some rows of the batch."""
        return self._each(lambda stream: stream[at], lambda positions: positions[..., at, :])

    def to(self, device: str | torch.device) -> "Streams":
        """On another device."""
        return self._each(*(lambda stream: stream.to(device),) * 2)

    def _each(
        self, change: Callable[[Tensor], Tensor], turn: Callable[[Tensor], Tensor]
    ) -> "Streams":
        hidden, mask, vision, groups = map(
            change, (self.hidden, self.mask, self.vision, self.groups)
        )
        planes, layered = (tuple(map(change, each)) for each in (self.planes, self.layered))
        positions = turn(self.positions)
        protected = None if self.protected is None else change(self.protected)
        raters = None if self.raters is None else change(self.raters)
        said = self.drafted, planes, layered, protected, raters
        return Streams(hidden, mask, positions, vision, groups, *said)

    @classmethod
    def join(cls, parts: Sequence["Streams"]) -> "Streams":
        """Parts of one batch, put together again."""
        marks, raters = [part.protected for part in parts], [part.raters for part in parts]
        return cls(
            torch.cat([part.hidden for part in parts]),
            torch.cat([part.mask for part in parts]),
            torch.cat([part.positions for part in parts], -2),
            torch.cat([part.vision for part in parts]),
            torch.cat([part.groups for part in parts]),
            parts[0].drafted,
            tuple(map(torch.cat, zip(*(part.planes for part in parts), strict=True))),
            tuple(map(torch.cat, zip(*(part.layered for part in parts), strict=True))),
            None if None in marks else torch.cat([mark for mark in marks if mark is not None]),
            None if None in raters else torch.cat([each for each in raters if each is not None]),
        )

    def is_protected(self) -> Tensor:
        """``[B, V]``: vision tokens that are never dropped."""
        nobody = torch.zeros_like(self.mask, dtype=torch.bool)
        marks = nobody if self.protected is None else self.protected
        return marks.gather(1, self.vision) & self.is_real()

    def is_real(self) -> Tensor:
        """``[B, V]``: vision tokens that are no pads."""
        return self.mask.gather(1, self.vision) != 0


def rows_at(states: Tensor, kept: Tensor) -> Tensor:
    """``states`` ``[B, S, D]`` at the columns ``kept`` ``[B, S']``."""
    return torch.stack([row[columns] for row, columns in zip(states, kept, strict=True)])


def columns_at(positions: Tensor, kept: Tensor) -> Tensor:
    """``positions`` ``[..., B, S]`` at the columns ``kept`` ``[B, S']``."""
    return positions.gather(-1, kept.expand(*positions.shape[:-1], -1))


def row_shares(
    attention: Attention, streams: Streams, query: str, heads: str
) -> Iterator[tuple[int, Tensor]]:
    """The probability ``[R, V]`` fp32 that each query row gives each vision token, row by row."""
    past = attention.keys.shape[2] - streams.mask.shape[1]
    keys = attention.for_each_head(attention.keys).float()
    prompt = streams.mask.shape[1] - streams.drafted
    for row, columns in enumerate(streams.vision):
        asking = query_rows(streams.mask[row, :prompt], columns, query)
        if streams.raters is not None:
            asking = streams.raters[row].nonzero()[:, 0]
        logits = attention.logits(attention.query[row][:, asking].float(), keys[row])
        logits = logits.masked_fill(~attention.visible[row][asking], -torch.inf)
        probabilities = logits.softmax(-1)
        by_row = probabilities.mean(0) if heads == "mean" else probabilities.amax(0)
        yield row, by_row[:, past + columns]


def vision_score(attention: Attention, streams: Streams, query: str, heads: str) -> Tensor:
    """``[B, V]`` fp32: the probability the query rows give each vision token, on average."""
    score = torch.empty(streams.vision.shape, dtype=torch.float32, device=streams.mask.device)
    if streams.vision.shape[1] == 0:
        return score
    for row, shares in row_shares(attention, streams, query, heads):
        score[row] = shares.mean(0)
    score = torch.where(score.isnan(), NAN_SCORE, score)
    return torch.where(streams.is_real(), score, PAD_SCORE)


def query_rows(mask: Tensor, vision: Tensor, query: str) -> Tensor:
    """The columns of one row that ask: the last, or all text after the last vision token."""
    last = mask.shape[0] - 1
    if query == "last":
        return torch.tensor([last], device=mask.device)
    real_vision = vision[mask[vision] != 0]
    after = int(real_vision[-1]) + 1 if len(real_vision) else 0
    is_asking = mask != 0
    is_asking[:after] = False
    is_asking[last] = True
    return is_asking.nonzero()[:, 0]


def image_count(schedule: Resolved, columns: int) -> int:
    """Groups that are ranked apart: one, or one an image with rank: per_image."""
    if schedule.rank == "joint" or columns == 0:
        return 1
    size = schedule.tokens_per_image
    if size is None or columns % size:
        raise ValueError(f"rank: per_image needs whole images of {size} tokens, got {columns=}")
    return columns // size


def select(score: Tensor, is_real: Tensor, keep: Keep, budget: Budget, images: int) -> Tensor:
    """Entries of the vision index that survive ``[B, k]``, ascending.

    A row's budget follows from its own tokens; its leftmost pads fill what is left of k, and
    where there are not enough of them, ``MISSING`` does.
    """
    columns, tokens_of_row = budget
    k = min(keep.of(columns // images), score.shape[1] // images)
    counts = [min(keep.of(tokens), k) if images == 1 else k for tokens in tokens_of_row]
    return best_of_rows(score, is_real, k, counts, images)


def best_of_rows(
    score: Tensor, is_real: Tensor, k: int, counts: Sequence[int], images: int = 1
) -> Tensor:
    """``[B, k]`` as ``select`` says: of each row's group the ``counts`` best that are real."""
    size, rows = score.shape[1] // images, []
    for row, count in enumerate(counts):
        real = int(is_real[row].sum())
        spare = k - min(count, real) if images == 1 else 0
        pads = min(spare, score.shape[1] - real)
        groups = score[row].view(images, size)
        missing = torch.full((spare - pads,), MISSING, device=score.device)
        kept = [_best(group, k - len(missing), pads) + i * size for i, group in enumerate(groups)]
        rows.append(torch.cat([missing, *kept]))
    return torch.stack(rows)


def _best(score: Tensor, k: int, pads: int) -> Tensor:
    """The first ``pads`` entries and the ``k - pads`` best, ascending; ties go to the lower."""
    order = score.sort(descending=True, stable=True).indices
    first = torch.arange(pads, device=score.device)
    return torch.cat((first, order[: k - pads])).sort().values


def survivors(streams: Streams, chosen: Tensor) -> Tensor:
    """``[B, S']``: all columns but the vision tokens that were not chosen, ascending.

    For each that is ``MISSING`` the last column stands in front; ``is_stand_in`` tells it.
    """
    rows = []
    for mask, vision, entries in zip(streams.mask, streams.vision, chosen, strict=True):
        survives = torch.ones_like(mask, dtype=torch.bool)
        survives[vision] = False
        survives[vision[entries[entries != MISSING]]] = True
        stand_ins = int((entries == MISSING).sum())
        rows.append(
            nn.functional.pad(survives.nonzero()[:, 0], (stand_ins, 0), value=len(mask) - 1)
        )
    return torch.stack(rows)


def is_stand_in(kept: Tensor) -> Tensor:
    """``[B, S']`` bool: columns in front that no token of the row fills; they are masked."""
    return nn.functional.pad(kept[:, :-1] >= kept[:, 1:], (0, 1), value=False)


def is_among(columns: Tensor, others: Tensor) -> Tensor:
    """``[B, N]`` bool: which of ``columns`` ``[B, N]`` occur in ``others`` ``[B, M]``."""
    return (columns[:, :, None] == others[:, None, :]).any(2)


def margin_of(score: Tensor, is_kept: Tensor, images: int) -> Tensor:
    """``[B]``: worst kept minus best dropped real token, the least of all groups."""
    if score.shape[1] == 0:
        return score.new_full(score.shape[:1], torch.inf)
    is_real = score > PAD_SCORE
    worst = torch.where(is_kept & is_real, score, torch.inf).view(len(score), images, -1).amin(2)
    best = torch.where(~is_kept & is_real, score, -torch.inf).view(len(score), images, -1).amax(2)
    return (worst - best).amin(1)


def positions_of(padding: Tensor) -> Tensor:
    """``[B, T]``: how many real tokens stand before each column; pads at the front are 0."""
    return (padding.cumsum(1) - 1).clamp(min=0)


def visible_keys(past_mask: Tensor, streams: Streams, grouped: bool = True) -> Tensor:
    """``[B, S, T]``: a row sees the real keys up to itself, itself always, its group if so."""
    padding = torch.cat((past_mask, streams.mask), 1) != 0
    past, total = past_mask.shape[1], padding.shape[1]
    row = torch.arange(past, total, device=padding.device)[:, None]
    key = torch.arange(total, device=padding.device)[None, :]
    before = ((key <= row) & padding[:, None, :]) | (key == row)
    if not grouped:
        return before
    own = streams.groups[:, :, None]
    others = nn.functional.pad(streams.groups, (past, 0))[:, None, :]
    return before | ((own == others) & (own > 0))
