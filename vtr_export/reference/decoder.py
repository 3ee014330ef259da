"""The oracle: a decoder with cuts in plain PyTorch, written from the definition of a cut."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vtr_export.schedule import Cut, Keep, Resolved

NAN_SCORE, PAD_SCORE = -1.0, -2.0


@dataclass(frozen=True)
class Cache:
    """What a call leaves behind, per layer and per stage.

    ``padding[0]`` is the attention mask of the unpruned sequence.
    """

    keys: tuple[Tensor, ...]  # [B, kv_heads, P_stage, head_dim] of each layer
    values: tuple[Tensor, ...]
    padding: tuple[Tensor, ...]  # [B, P_stage] of each stage, 1 = real


@dataclass(frozen=True)
class Step:
    """One call. The tuples hold one entry a cut: J is between stage J and stage J + 1."""

    logits: Tensor  # [B, 1, vocab] fp32; every surviving row with logits="all"
    cache: Cache
    kept: tuple[Tensor, ...]  # [B, S_{J+1}] columns of stage J's sequence, ascending
    kept_vision: tuple[Tensor, ...]  # [B, V_{J+1}] columns of stage J + 1's sequence
    margins: tuple[Tensor, ...]  # [B] worst kept minus best dropped score; inf when none is
    scores: tuple[Tensor, ...]  # [B, V_J] fp32; NaN is -1, a pad is -2


@dataclass(frozen=True)
class Generation:
    """A greedy answer; a finished row repeats its end token."""

    tokens: Tensor  # [B, n]
    logits: Tensor  # [B, n, vocab], those each token was chosen from
    prefill: Step
    cache: Cache  # knows all tokens but the last
    attention_mask: Tensor  # [B, P + S + n - 1]


@dataclass(frozen=True)
class _Streams:
    """Everything with a token axis that crosses a cut."""

    hidden: Tensor  # [B, S, D]
    mask: Tensor  # [B, S] 1 = real
    positions: Tensor  # [B, S] of the rotary embedding
    vision: Tensor  # [B, V] columns of the vision tokens, ascending; pads come first

    def is_real(self) -> Tensor:
        """``[B, V]``: vision tokens that are no pads."""
        return self.mask.gather(1, self.vision) != 0


@dataclass(frozen=True)
class _Attention:
    """One layer's attention before its softmax. T = past + new."""

    query: Tensor  # [B, heads, S, head_dim], rotated
    keys: Tensor  # [B, kv_heads, T, head_dim], rotated
    values: Tensor  # [B, kv_heads, T, head_dim]
    visible: Tensor  # [B, S, T] bool
    scaling: float

    def for_each_head(self, states: Tensor) -> Tensor:
        """Keys or values with each kv head repeated for the query heads that share it."""
        return states.repeat_interleave(self.query.shape[1] // states.shape[1], dim=1)


@dataclass(frozen=True)
class _Choice:
    """What one cut decided; see :class:`Step`."""

    kept: Tensor
    margin: Tensor
    score: Tensor


@dataclass
class _Call:
    """What one call gathers on its way through the layers."""

    past: Cache
    budget: tuple[int, list[int]]  # vision columns, real vision tokens of each row
    forced: Sequence[Tensor] | None
    stage: int = 0
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    padding: list[Tensor] = field(default_factory=list)
    choices: list[_Choice] = field(default_factory=list)
    kept_vision: list[Tensor] = field(default_factory=list)


class Reference:
    """A decoder (``layers``, ``norm``, ``rotary_emb``) and its head under a schedule."""

    def __init__(self, decoder: nn.Module, lm_head: nn.Module, schedule: Resolved) -> None:
        self.decoder = cast("Any", decoder)
        self.lm_head, self.schedule = lm_head, schedule
        if schedule.layers != (layers := len(self.decoder.layers)):
            raise ValueError(f"{schedule.layers=} but the decoder has {layers}")
        self.cuts = {cut.before_layer: cut for cut in schedule.cuts}

    @torch.no_grad()
    def __call__(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        vision_index: Tensor,
        cache: Cache | None = None,
        *,
        forced: Sequence[Tensor] | None = None,
        logits: Literal["last", "all"] = "last",
    ) -> Step:
        """Run ``inputs_embeds`` ``[B, S, D]`` after ``cache``; the last column is always real.

        ``attention_mask`` ``[B, P + S]`` is of the unpruned sequence. ``forced`` gives every
        cut its ``kept`` instead of letting the scores choose.
        """
        past = attention_mask.shape[1] - inputs_embeds.shape[1]
        cache = cache or self._empty_cache(inputs_embeds)
        cache = replace(cache, padding=(attention_mask[:, :past], *cache.padding[1:]))
        streams = _Streams(inputs_embeds, attention_mask[:, past:], position_ids, vision_index)
        budget = vision_index.shape[1], streams.is_real().sum(1).tolist()
        call = _Call(cache, budget, forced, padding=[attention_mask])
        for index in range(len(self.decoder.layers)):
            streams = self._layer(index, streams, call)
        rows = streams.hidden if logits == "all" else streams.hidden[:, -1:]
        return Step(
            logits=self.lm_head(self.decoder.norm(rows)).float(),
            cache=Cache(tuple(call.keys), tuple(call.values), tuple(call.padding)),
            kept=tuple(choice.kept for choice in call.choices),
            kept_vision=tuple(call.kept_vision),
            margins=tuple(choice.margin for choice in call.choices),
            scores=tuple(choice.score for choice in call.choices),
        )

    @torch.no_grad()
    def generate(
        self,
        embed_tokens: nn.Module,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        vision_index: Tensor,
        *,
        max_new_tokens: int,
        eos: Sequence[int] = (),
        cache: Cache | None = None,
        forced: Sequence[Tensor] | None = None,
    ) -> Generation:
        """Answer greedily. Positions are those of the unpruned sequence; see :class:`Cache`."""
        positions = positions_of(attention_mask)[:, -inputs_embeds.shape[1] :]
        prefill = self(inputs_embeds, attention_mask, positions, vision_index, cache, forced=forced)
        ends = torch.tensor(list(eos), dtype=torch.int64, device=inputs_embeds.device)
        step, tokens, logits = prefill, [prefill.logits.argmax(-1)], [prefill.logits]
        while len(tokens) < max_new_tokens:
            done = torch.isin(tokens[-1], ends)
            if bool(done.all()):
                break
            attention_mask = nn.functional.pad(attention_mask, (0, 1), value=1)
            step = self(
                embed_tokens(tokens[-1]),
                attention_mask,
                positions_of(attention_mask)[:, -1:],
                vision_index[:, :0],
                step.cache,
            )
            tokens.append(torch.where(done, tokens[-1], step.logits.argmax(-1)))
            logits.append(step.logits)
        return Generation(
            torch.cat(tokens, 1), torch.cat(logits, 1), prefill, step.cache, attention_mask
        )

    def _empty_cache(self, like: Tensor) -> Cache:
        attentions = [layer.self_attn for layer in self.decoder.layers]
        empty = tuple(
            like.new_zeros((len(like), it.k_proj.out_features // it.head_dim, 0, it.head_dim))
            for it in attentions
        )
        padding = like.new_zeros((like.shape[0], 0), dtype=torch.int64)
        return Cache(empty, empty, (padding,) * (len(self.schedule.cuts) + 1))

    def _layer(self, index: int, streams: _Streams, call: _Call) -> _Streams:
        """Layer ``index``, with the cut before it (from: next) or after it (from: previous)."""
        layer = self.decoder.layers[index]
        is_next, is_inside = self.schedule.source == "next", self.schedule.drop_point == "inside"
        if is_next and index in self.cuts:
            whole = self._project(index, streams, call, call.stage + 1)
            streams = self._narrow(
                streams, self._choose(self.cuts[index], whole, streams, call), call
            )
        attention = self._project(index, streams, call, call.stage)
        call.keys.append(attention.keys)
        call.values.append(attention.values)
        mixed = _mix(attention)
        kept: Tensor | None = None
        if not is_next and index + 1 in self.cuts:
            kept = self._choose(self.cuts[index + 1], attention, streams, call)
        if kept is not None and is_inside:
            mixed, streams = _rows(mixed, kept), self._narrow(streams, kept, call)
        hidden = streams.hidden + layer.self_attn.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        streams = replace(streams, hidden=hidden)
        return streams if kept is None or is_inside else self._narrow(streams, kept, call)

    def _project(self, index: int, streams: _Streams, call: _Call, stage: int) -> _Attention:
        """Layer ``index``'s attention for all rows of ``streams``, on the past of ``stage``."""
        layer = self.decoder.layers[index]
        attention = layer.self_attn
        normed = layer.input_layernorm(streams.hidden)
        heads = (*normed.shape[:2], -1, attention.head_dim)
        query, key, value = (
            project(normed).view(heads).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = self.decoder.rotary_emb(normed, streams.positions)
        return _Attention(
            _rotate(query, cos[:, None], sin[:, None]),
            torch.cat((call.past.keys[index], _rotate(key, cos[:, None], sin[:, None])), 2),
            torch.cat((call.past.values[index], value), 2),
            _visible(call.past.padding[stage], streams.mask),
            attention.scaling,
        )

    def _choose(self, cut: Cut, attention: _Attention, streams: _Streams, call: _Call) -> Tensor:
        """Score, select, and note down what was decided; return ``kept`` ``[B, S']``."""
        schedule = self.schedule
        score = _vision_score(attention, streams, schedule.query, schedule.heads)
        images = _image_count(schedule, call.budget[0])
        if call.forced is None:
            chosen = _select(score, streams.is_real(), cut.keep, call.budget, images)
            kept = _survivors(streams, chosen)
        else:
            kept = call.forced[len(call.choices)]
        margin = _margin(score, _is_among(streams.vision, kept), images)
        call.choices.append(_Choice(kept, margin, score))
        return kept

    def _narrow(self, streams: _Streams, kept: Tensor, call: _Call) -> _Streams:
        """``streams`` on the columns ``kept``, in the next stage."""
        call.stage += 1
        mask = streams.mask.gather(1, kept)
        padding = torch.cat((call.past.padding[call.stage], mask), 1)
        positions = streams.positions.gather(1, kept)
        if self.schedule.positions == "repacked":
            positions = positions_of(padding)[:, -kept.shape[1] :]
        is_vision = _is_among(kept, streams.vision)
        vision = torch.stack([row.nonzero()[:, 0] for row in is_vision])
        call.padding.append(padding)
        call.kept_vision.append(vision)
        return _Streams(_rows(streams.hidden, kept), mask, positions, vision)


def _rows(states: Tensor, kept: Tensor) -> Tensor:
    """``states`` ``[B, S, D]`` at the columns ``kept`` ``[B, S']``."""
    return torch.stack([row[columns] for row, columns in zip(states, kept, strict=True)])


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves paired."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), -1) * sin


def _visible(past_mask: Tensor, mask: Tensor) -> Tensor:
    """``[B, S, T]``: a row sees the real keys up to itself, and always itself."""
    padding = torch.cat((past_mask, mask), 1) != 0
    past, total = past_mask.shape[1], padding.shape[1]
    row = torch.arange(past, total, device=mask.device)[:, None]
    key = torch.arange(total, device=mask.device)[None, :]
    return ((key <= row) & padding[:, None, :]) | (key == row)


def _mix(attention: _Attention) -> Tensor:
    """Attention times V ``[B, S, heads * head_dim]``, before o_proj; softmax in fp32."""
    keys = attention.for_each_head(attention.keys)
    logits = attention.query @ keys.transpose(2, 3) * attention.scaling
    logits = logits.masked_fill(~attention.visible[:, None], -torch.inf)
    probabilities = logits.softmax(-1, dtype=torch.float32).to(logits.dtype)
    mixed = probabilities @ attention.for_each_head(attention.values)
    return mixed.transpose(1, 2).flatten(2)


def _vision_score(attention: _Attention, streams: _Streams, query: str, heads: str) -> Tensor:
    """``[B, V]`` fp32: the probability the query rows give each vision token."""
    past = attention.keys.shape[2] - streams.mask.shape[1]
    keys = attention.for_each_head(attention.keys).float()
    score = torch.empty(streams.vision.shape, dtype=torch.float32, device=streams.mask.device)
    if streams.vision.shape[1] == 0:
        return score
    for row, columns in enumerate(streams.vision):
        asking = _query_rows(streams.mask[row], columns, query)
        logits = attention.query[row][:, asking].float() @ keys[row].transpose(1, 2)
        logits = logits * attention.scaling
        logits = logits.masked_fill(~attention.visible[row][asking], -torch.inf)
        probabilities = logits.softmax(-1)
        by_row = probabilities.mean(0) if heads == "mean" else probabilities.amax(0)
        score[row] = by_row.mean(0)[past + columns]
    score = torch.where(score.isnan(), NAN_SCORE, score)
    return torch.where(streams.is_real(), score, PAD_SCORE)


def _query_rows(mask: Tensor, vision: Tensor, query: str) -> Tensor:
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


def _image_count(schedule: Resolved, columns: int) -> int:
    """Groups that are ranked apart: one, or one an image with rank: per_image."""
    if schedule.rank == "joint" or columns == 0:
        return 1
    size = schedule.tokens_per_image
    if size is None or columns % size:
        raise ValueError(f"rank: per_image needs whole images of {size} tokens, got {columns=}")
    return columns // size


def _select(
    score: Tensor, is_real: Tensor, keep: Keep, budget: tuple[int, list[int]], images: int
) -> Tensor:
    """Entries of the vision index that survive ``[B, k]``, ascending.

    A row's budget follows from its own tokens; its leftmost pads fill what is left of k.
    """
    columns, tokens_of_row = budget
    size = score.shape[1] // images
    k = min(keep.of(columns // images), size)
    rows = []
    for row, tokens in enumerate(tokens_of_row):
        real = int(is_real[row].sum())
        pads = min(k - min(keep.of(tokens), real, k), size - real) if images == 1 else 0
        groups = score[row].view(images, size)
        rows.append(torch.cat([_best(group, k, pads) + i * size for i, group in enumerate(groups)]))
    return torch.stack(rows)


def _best(score: Tensor, k: int, pads: int) -> Tensor:
    """The first ``pads`` entries and the ``k - pads`` best, ascending; ties go to the lower."""
    order = score.sort(descending=True, stable=True).indices
    first = torch.arange(pads, device=score.device)
    return torch.cat((first, order[: k - pads])).sort().values


def _survivors(streams: _Streams, chosen: Tensor) -> Tensor:
    """``[B, S']``: all columns but the vision tokens that were not chosen, ascending."""
    survives = torch.ones_like(streams.mask, dtype=torch.bool)
    survives.scatter_(1, streams.vision, False)
    survives.scatter_(1, streams.vision.gather(1, chosen), True)
    return torch.stack([row.nonzero()[:, 0] for row in survives])


def _is_among(columns: Tensor, others: Tensor) -> Tensor:
    """``[B, N]`` bool: which of ``columns`` ``[B, N]`` occur in ``others`` ``[B, M]``."""
    return (columns[:, :, None] == others[:, None, :]).any(2)


def _margin(score: Tensor, is_kept: Tensor, images: int) -> Tensor:
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
