"""The oracle: a decoder with cuts in plain PyTorch, written from the definition of a cut."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vtr_export.reference import layered
from vtr_export.reference.blocks import block_score, correlated
from vtr_export.reference.compact import compacted
from vtr_export.reference.crossing import Crossing, Walk, run_crossed
from vtr_export.reference.cut import (
    Budget,
    Streams,
    columns_at,
    image_count,
    is_among,
    is_stand_in,
    margin_of,
    positions_of,
    rows_at,
    select,
    survivors,
    visible_keys,
    vision_score,
)
from vtr_export.reference.layers import Attention, Handed, Layers
from vtr_export.reference.recycling import Recycled, raters_of, recycle
from vtr_export.reference.state import Cache, Generation, Held, Step
from vtr_export.reference.threshold import above, evidence, marked, nearest, protected_first
from vtr_export.schedule import Cut, Resolved
from vtr_export.schedule_document import Correlate, Recycle


@dataclass(frozen=True)
class _Choice:
    """What one cut decided; see :class:`Step`."""

    kept: Tensor
    margin: Tensor
    score: Tensor
    label: Tensor | None = None


@dataclass
class _Call:
    """What one call gathers on its way through the layers."""

    past: Cache
    budget: Budget
    forced: Sequence[Tensor] | None = None
    stage: int = 0
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    padding: list[Tensor] = field(default_factory=list)
    choices: list[_Choice] = field(default_factory=list)
    walk: Walk | None = None
    kept_vision: list[Tensor] = field(default_factory=list)
    merged: Tensor | None = None  # what the next cut keeps: it was made inside the layer before
    recycled: Recycled | None = None  # what the last cut made


class Reference:
    """A decoder (``layers``, ``norm``) of transformers and its head under a schedule.

    ``attention``: eager is the definition, softmax in fp32; sdpa is torch's fused product, for
    those who only want the answer. A cut inside a layer (``drop_point: inside``) is made behind
    it: what follows attention times V treats every row alone.
    """

    def __init__(
        self,
        decoder: nn.Module,
        lm_head: nn.Module,
        schedule: Resolved,
        *,
        attention: Literal["eager", "sdpa"] = "eager",
    ) -> None:
        self.decoder = cast("Any", decoder)
        self.lm_head, self.schedule = lm_head, schedule
        self._layers = Layers(decoder, attention)
        self._grouped = [layered.sees_groups(decoder, index) for index in range(len(self._layers))]
        if schedule.layers != (layers := len(self._layers)):
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
        groups: Tensor | None = None,
        crossing: Crossing | None = None,
        protected: Tensor | None = None,
        logits: Literal["last", "all"] = "last",
    ) -> Step:
        """Run ``inputs_embeds`` ``[B, S, D]`` after ``cache``; the last column is always real.

        Planes may stand behind, ``[B, S, (1 + n) D]``: the n-th is added to what leaves layer n.
        ``attention_mask`` ``[B, P + S]`` is of the unpruned sequence. ``forced`` gives each cut its
        ``kept``; ``groups`` ``[B, S]``: equal ones but 0 see each other; ``crossing``: keys;
        ``protected`` ``[B, V]``: 1 = a vision token that is never dropped.
        """
        past = attention_mask.shape[1] - inputs_embeds.shape[1]
        cache = cache or self._empty_cache(inputs_embeds)
        cache = replace(cache, padding=(attention_mask[:, :past], *cache.padding[1:]))
        mask = attention_mask[:, past:]
        if self.schedule.crosses:
            crossing = crossing or Crossing.nothing(inputs_embeds, self.decoder)
        asked = inputs_embeds, mask, position_ids, vision_index, groups
        held = self._begin(*asked, crossing=crossing, protected=protected)
        call = _Call(cache, held.budget, forced, padding=[attention_mask])
        if crossing is not None:
            call.walk = Walk(self.schedule, crossing, cache, forced)
        streams = self._run(held, len(self._layers), call).streams
        rows = streams.hidden if logits == "all" else streams.hidden[:, -1:]
        hidden = self.decoder.norm(rows)
        if call.walk is not None:
            call.choices += [_Choice(*decided) for decided in call.walk.decided]
            call.padding += call.walk.padding
            call.kept_vision += call.walk.kept_vision
        return Step(
            logits=self.lm_head(hidden).float(),
            hidden=hidden,
            cache=Cache(tuple(call.keys), tuple(call.values), tuple(call.padding)),
            kept=tuple(choice.kept for choice in call.choices),
            kept_vision=tuple(call.kept_vision),
            margins=tuple(choice.margin for choice in call.choices),
            scores=tuple(choice.score for choice in call.choices),
            labels=tuple(choice.label for choice in call.choices if choice.label is not None),
        )

    @torch.no_grad()
    def hold(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        vision_index: Tensor,
        *,
        groups: Tensor | None = None,
        drafted: int = 0,
    ) -> Held:
        """A first call before layer 0; its last ``drafted`` columns are an answer, not the prompt.

        They are rows like any other, but no cut's score asks them.
        """
        if isinstance(self.schedule.merge, Correlate):
            raise ValueError("what is merged inside a layer cannot be held before the next")
        inputs = inputs_embeds, attention_mask, position_ids, vision_index, groups
        return self._begin(*inputs, drafted)

    @torch.no_grad()
    def advance(self, held: Held, layer: int) -> Held:
        """Go on to ``layer``, with this schedule's cuts from ``held.layer`` on but that one."""
        return self._run(held, layer, _Call(self._empty_cache(held.streams.hidden), held.budget))

    @torch.no_grad()
    def finish(self, held: Held) -> Tensor:
        """``[B, 1 + drafted, D]``: the prompt's end and the draft after all layers and the norm.

        ``lm_head`` makes logits of them.
        """
        end = self.advance(held, len(self._layers)).streams
        return cast("Tensor", self.decoder.norm(end.hidden[:, -1 - end.drafted :]))

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
        positions: tuple[Tensor, Tensor] | None = None,
        groups: Tensor | None = None,
        crossing: Crossing | None = None,
        protected: Tensor | None = None,
    ) -> Generation:
        """Answer greedily. Positions are those of the unpruned sequence; see :class:`Cache`.

        ``positions`` are the prompt's, and what is to be added to the count of what follows.
        """
        counted = positions_of(attention_mask)[:, -inputs_embeds.shape[1] :]
        first, ahead = positions or (counted, counted.new_zeros(len(counted)))
        asked = inputs_embeds, attention_mask, first, vision_index, cache
        more: dict[str, Any] = {"groups": groups, "crossing": crossing, "protected": protected}
        prefill = self(*asked, forced=forced, **more)
        ends = torch.tensor(list(eos), dtype=torch.int64, device=inputs_embeds.device)
        step = replace(prefill, cache=compacted(prefill.cache, prefill.kept, self.schedule))
        steps, tokens = [prefill], [prefill.logits.argmax(-1)]
        while len(tokens) < max_new_tokens:
            done = torch.isin(tokens[-1], ends)
            if bool(done.all()):
                break
            attention_mask = nn.functional.pad(attention_mask, (0, 1), value=1)
            place = positions_of(attention_mask)[:, -1:] + ahead[:, None]
            step = self(
                embed_tokens(tokens[-1]),
                attention_mask,
                place.expand(*first.shape[:-1], 1),
                vision_index[:, :0],
                step.cache,
            )
            tokens.append(torch.where(done, tokens[-1], step.logits.argmax(-1)))
            steps.append(step)
        return Generation(
            tokens=torch.cat(tokens, 1),
            logits=torch.cat([each.logits for each in steps], 1),
            hidden=torch.cat([each.hidden for each in steps], 1),
            prefill=prefill,
            cache=step.cache,
            attention_mask=attention_mask,
        )

    def _empty_cache(self, like: Tensor) -> Cache:
        nothing = (None,) * len(self._layers)
        padding = like.new_zeros((like.shape[0], 0), dtype=torch.int64)
        stages = len(self.schedule.cuts) + 1 + bool(self.schedule.crosses)
        return Cache(nothing, nothing, (padding,) * stages)

    def _begin(
        self,
        embeds: Tensor,
        mask: Tensor,
        positions: Tensor,
        vision: Tensor,
        groups: Tensor | None,
        drafted: int = 0,
        crossing: Crossing | None = None,
        protected: Tensor | None = None,
    ) -> Held:
        """A call before layer 0."""
        width = getattr(self.decoder.config, "hidden_size", embeds.shape[-1])
        embeds, beside = layered.apart(self.decoder, embeds)
        own, *planes = torch.split(embeds, width, -1)
        groups = torch.zeros_like(mask) if groups is None else groups
        with self._layers.heard():
            crossed = crossing.handed() if crossing is not None else {}
            crossed = {**layered.given(self.decoder, own, beside), **crossed}
            hidden, handed = self._layers.hand(own, positions, groups, crossed)
        noted = layered.noted(handed) if beside is not None else ()
        marks = marked(vision, protected, mask) if self.schedule.protect else None
        raters = raters_of(own, mask, vision, drafted) if self.schedule.query == "raters" else None
        more = drafted, tuple(planes), noted, marks, raters
        streams = Streams(hidden, mask, positions, vision, groups, *more)
        return Held(0, streams, None, (vision.shape[1], streams.is_real().sum(1).tolist()))

    def _run(self, held: Held, last: int, call: _Call) -> Held:
        """Layers ``held.layer`` to ``last - 1``, each with the cut before it."""
        with self._layers.heard():
            return self._run_heard(held, last, call)

    def _run_heard(self, held: Held, last: int, call: _Call) -> Held:
        if call.walk is not None:
            causal = visible_keys(call.past.padding[0], held.streams)
            streams, states = run_crossed(self._layers, held.streams, causal, call.walk)
            call.keys, call.values = (list(part) for part in zip(*states, strict=True))
            return replace(held, layer=last, streams=streams)
        streams, score, handed = held.streams, held.score, self._hand(held.streams)
        for index in range(held.layer, last):
            if index in self.cuts:
                kept = self._kept(index, streams, handed, score, call)
                streams = self._narrow(streams, kept, call)
                handed = self._hand(streams)
            visible = visible_keys(call.past.padding[call.stage], streams, self._grouped[index])
            past = call.past.of(index)
            merging = self._merging(index + 1, streams, call)
            inside = merging if self.schedule.drop_point == "attended" else None
            ran = self._layers.run(index, streams.hidden, handed, past, visible, inside)
            hidden, attention, (keys, values) = ran
            call.keys.append(keys)
            call.values.append(values)
            is_asked = index + 1 in self.cuts or index + 1 == last < len(self._layers)
            by_this = is_asked and self.schedule.source == "previous" and merging is None
            score = self._score(attention, streams) if by_this else None
            if index < len(streams.planes):
                hidden = hidden + streams.planes[index]
            if merging is not None and inside is None:
                hidden = merging(hidden, attention)
            streams = replace(streams, hidden=hidden)
        if score is None and last < len(self._layers):
            score = self._own_score(last, streams, handed, call)
        return replace(held, layer=last, streams=streams, score=score)

    def _hand(self, streams: Streams) -> Handed:
        handed = self._layers.hand(streams.hidden, streams.positions, streams.groups)[1]
        again: Handed = layered.again(handed, streams.layered)
        return again

    def _kept(
        self, index: int, streams: Streams, handed: Handed, score: Tensor | None, call: _Call
    ) -> Tensor:
        """What the cut before layer ``index`` keeps, if that is not chosen already."""
        if (merged := call.merged) is not None:
            call.merged = None
            return merged
        if score is None:
            score = self._own_score(index, streams, handed, call)
        return self._choose(self.cuts[index], score, streams, call)

    def _merging(
        self, index: int, streams: Streams, call: _Call
    ) -> Callable[[Tensor, Attention], Tensor] | None:
        """What merges rows at the cut before layer ``index``, whose tokens it chooses."""
        merge, cut = self.schedule.merge, self.cuts.get(index)
        if not isinstance(merge, Correlate) or cut is None:
            return None

        def merged(hidden: Tensor, attention: Attention) -> Tensor:
            call.merged = self._choose(cut, self._score(attention, streams), streams, call)
            now = replace(streams, hidden=hidden)
            return correlated(attention, now, call.merged, merge, self.schedule)

        return merged

    def _score(self, attention: Attention, streams: Streams) -> Tensor:
        asked = self.schedule.query, self.schedule.heads
        if self.schedule.rule != "attention":
            return block_score(attention, streams, *asked, self.schedule.rule)
        if self.schedule.threshold is not None:
            return evidence(attention, streams, *asked, self.schedule.threshold)
        return protected_first(vision_score(attention, streams, *asked), streams)

    def _own_score(self, index: int, streams: Streams, handed: Handed, call: _Call) -> Tensor:
        """With from: next, layer ``index``'s score of the tokens that a cut before it meets."""
        stage = call.stage + (index in self.cuts)
        visible = visible_keys(call.past.padding[stage], streams, self._grouped[index])
        asked = self._layers.ask(index, streams.hidden, handed, call.past.of(index), visible)
        return self._score(asked, streams)

    def _choose(self, cut: Cut, score: Tensor, streams: Streams, call: _Call) -> Tensor:
        """Select, and note down what was decided; return ``kept`` ``[B, S']``."""
        images = image_count(self.schedule, call.budget[0])
        by_threshold = self.schedule.threshold is not None
        if call.forced is None:
            asked = score, streams.is_real(), cut.keep, call.budget
            chosen = above(*asked) if by_threshold else select(*asked, images)
            kept = survivors(streams, chosen)
        else:
            kept = call.forced[len(call.choices)]
            if isinstance(self.schedule.merge, Recycle):
                raise ValueError("who is kept does not say who is recycled")
        if isinstance(merge := self.schedule.merge, Recycle):
            return self._recycle(score, chosen, streams, merge, call)
        is_kept = is_among(streams.vision, kept)
        margin = nearest(score, is_kept) if by_threshold else margin_of(score, is_kept, images)
        call.choices.append(_Choice(kept, margin, score))
        return kept

    def _recycle(
        self, score: Tensor, chosen: Tensor, streams: Streams, merge: Recycle, call: _Call
    ) -> Tensor:
        """``_choose`` where dropped tokens become means behind the others."""
        made = call.recycled = recycle(score, chosen, streams, merge)
        margin = torch.minimum(margin_of(score, made.is_kept, 1), made.margin)
        call.choices.append(_Choice(made.kept, margin, score, made.label))
        return made.kept

    def _narrow(self, streams: Streams, kept: Tensor, call: _Call) -> Streams:
        """``streams`` on the columns ``kept``, in the next stage."""
        call.stage += 1
        made = call.recycled
        stands_in = is_stand_in(kept) if made is None else torch.zeros_like(kept) != 0
        mask = streams.mask.gather(1, kept).masked_fill(stands_in, 0)
        padding = torch.cat((call.past.padding[call.stage], mask), 1)
        positions = columns_at(streams.positions, kept)
        if self.schedule.positions == "repacked":
            positions = positions_of(padding)[:, -kept.shape[1] :]
        is_vision = is_among(kept, streams.vision) | stands_in
        rows = made.vision if made is not None else [row.nonzero()[:, 0] for row in is_vision]
        vision = torch.stack(tuple(rows))
        call.padding.append(padding)
        call.kept_vision.append(vision)
        planes = tuple(rows_at(plane, kept) for plane in streams.planes)
        beside = tuple(rows_at(each, kept) for each in streams.layered)
        marks = streams.protected
        marks = None if marks is None else marks.gather(1, kept) & ~stands_in
        hidden = rows_at(streams.hidden, kept) if made is None else made.hidden
        groups = streams.groups.gather(1, kept)
        raters = None if streams.raters is None else streams.raters.gather(1, kept)
        more = streams.drafted, planes, beside, marks, raters
        return Streams(hidden, mask, positions, vision, groups, *more)
