"""A random decoder with cuts, from its definition: one row of a batch, alone and without a pad."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from decoder_writer import EPSILON, SOFTCAP
from random_decoders import Decoder

from vtr_export.schedule import Cut, Resolved

Array = np.ndarray[Any, Any]
Kept = Sequence[Sequence[int]]


@dataclass
class Found:
    """Of one row: caches by name, the rows that each cut left, and how clear its choice was."""

    caches: dict[str, Array] = field(default_factory=dict)  # [kv_heads, past + survivors, width]
    columns: list[list[int]] = field(default_factory=list)
    margin: float = np.inf
    logits: Array = field(default_factory=lambda: np.zeros(0))


class Row:
    """Row ``b`` of ``feeds`` under ``schedule``; ``forced`` vision columns survive, if given."""

    def __init__(
        self,
        decoder: Decoder,
        weights: Mapping[str, Array],
        schedule: Resolved,
        feeds: Mapping[str, Array],
        b: int,
        forced: Kept | None = None,
    ) -> None:
        self.it, self.schedule, self.feeds, self.b = decoder, schedule, feeds, b
        self.weights = {name: array.astype(float) for name, array in weights.items()}
        self.cuts = {cut.before_layer: cut for cut in schedule.cuts}
        self.forced, self.found, self.stage = forced, Found(), 0
        sequence = feeds["inputs_embeds"].shape[1]
        current = feeds["attention_mask"][b, -sequence:]
        self.columns = np.flatnonzero(current)
        self.tokens = [int(c) for c in feeds["vision_index"][b] if current[c]]
        self.positions = feeds["position_ids"][..., b, :][..., self.columns]

    def decode(self) -> Found:
        """Layer after layer, and the head."""
        it = self.it
        hidden = self.feeds["inputs_embeds"][self.b, self.columns].astype(float)
        if it.absolute:
            hidden = hidden + self.weights["absolute"][self.positions]
        for index in range(it.layers):
            hidden = self._layer(index, hidden)
        self.found.logits = self._norm(hidden, "last") @ self.weights["head"]
        return self.found

    def _layer(self, index: int, hidden: Array) -> Array:
        it = self.it
        if self.schedule.source == "next" and index in self.cuts:
            odds, _, _ = self._odds(index, self._before(index, hidden, "a"), self.stage + 1)
            hidden = hidden[self._narrow(self.cuts[index], odds)]
        source = self._before(index, hidden, "a")
        odds, keys, values = self._odds(index, source, self.stage)
        self.found.caches |= {f"{index}.key": keys, f"{index}.value": values}
        mixed = np.einsum("hst,htd->shd", odds, values.repeat(it.group, 0)).reshape(len(hidden), -1)
        alive = slice(None)
        if self.schedule.source == "previous" and index + 1 in self.cuts:
            alive = self._narrow(self.cuts[index + 1], odds)
        if self.schedule.drop_point == "inside":
            mixed, source, hidden, alive = mixed[alive], source[alive], hidden[alive], slice(None)
        if it.output_gate:
            mixed = mixed / (1 + np.exp(-self._linear(source, "og", index)))
        hidden = self._residual(index, hidden, self._linear(mixed, "o", index))[alive]
        if index < it.planes:
            hidden = hidden + self._plane(index)
        return hidden

    def _before(self, index: int, hidden: Array, which: str) -> Array:
        """What a sublayer reads."""
        is_normed = self.it.arrangement in ("pre", "sandwich")
        return self._norm(hidden, f"{which}{index}") if is_normed else hidden

    def _behind(self, index: int, states: Array, which: str) -> Array:
        """What a sublayer gives."""
        is_normed = self.it.arrangement in ("post", "sandwich")
        states = self._norm(states, f"{which}{index}") if is_normed else states
        return 0.5 * states if self.it.multiplier else states

    def _outer(self, index: int, hidden: Array, which: str) -> Array:
        return self._norm(hidden, f"{which}{index}") if self.it.arrangement == "outer" else hidden

    def _residual(self, index: int, hidden: Array, mixed: Array) -> Array:
        """Everything behind attention's output projection."""
        mixed = self._behind(index, mixed, "b")
        if self.it.mlp == "none":
            return self._outer(index, hidden + mixed, "e")
        if self.it.parallel:
            source = hidden
        else:
            source = hidden = self._outer(index, hidden + mixed, "e")
        fed = self._behind(index, self._feed(index, self._before(index, source, "c")), "d")
        hidden = hidden + mixed + fed if self.it.parallel else hidden + fed
        return self._outer(index, hidden, "f")

    def _plane(self, index: int) -> Array:
        stacked = self.it.stacked_planes
        plane = self.feeds["deepstack"][index] if stacked else self.feeds[f"deepstack.{index}"]
        return plane[self.b, self.columns].astype(float)

    # --- what a layer computes ---

    def _linear(self, states: Array, part: str, index: int) -> Array:
        made = states @ self.weights[f"{part}{index}"]
        return made + self.weights[f"bias_{part}{index}"] if self.it.bias else made

    def _norm(self, states: Array, name: str) -> Array:
        scale = self.weights[f"norm_{name}"]
        if self.it.norm == "layer":
            states = states - states.mean(-1, keepdims=True)
        normed = states / np.sqrt((states**2).mean(-1, keepdims=True) + EPSILON)
        if self.it.norm == "layer":
            return normed * scale + self.weights[f"shift_{name}"]
        return normed * (scale + 1 if self.it.norm == "plus_one" else scale)

    def _feed(self, index: int, states: Array) -> Array:
        up = self._linear(states, "up", index)
        if self.it.mlp == "tanh":
            wide = np.tanh(up)
        elif self.it.mlp == "gelu":
            wide = up * (1 + np.vectorize(_erf)(up / np.sqrt(2))) / 2
        else:
            gate = self._linear(states, "gate", index)
            wide = gate / (1 + np.exp(-gate)) * up
        return self._linear(wide, "down", index)

    def _odds(self, index: int, states: Array, stage: int) -> tuple[Array, Array, Array]:
        """Probabilities [heads,S,T], keys and values [kv_heads,T,width], the past's before them."""
        it = self.it
        query = self._heads(self._linear(states, "q", index), f"q{index}", it.heads)
        keys = self._heads(self._linear(states, "k", index), f"k{index}", it.kv_heads)
        values = self._linear(states, "v", index).reshape(len(states), it.kv_heads, -1)
        seen = self._past_mask(stage)
        keys, values = (
            np.concatenate([self._cache(f"{index}.{part}")[:, seen], new.swapaxes(0, 1)], 1)
            for part, new in (("key", keys), ("value", values))
        )
        logits = np.einsum("shd,htd->hst", query, keys.repeat(it.group, 0)) * it.scale
        past, rows = len(seen), len(states)
        ahead = np.arange(past + rows) > past + np.arange(rows)[:, None]
        if it.softcap:
            logits = SOFTCAP * np.tanh(logits / SOFTCAP)
        if it.grouped:
            groups = self.feeds["groups"][self.b, self.columns]
            ahead[:, past:] &= (groups[:, None] != groups) | (groups == 0)
        logits = np.where(ahead, -np.inf, logits)
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        return odds / odds.sum(-1, keepdims=True), keys, values

    def _past_mask(self, stage: int) -> Array:
        """Which entries of the past of ``stage`` are real."""
        length = self.feeds["inputs_embeds"].shape[1]
        whole = self.feeds["attention_mask"][self.b]
        past = (
            whole[: len(whole) - length]
            if stage == 0
            else self.feeds[f"past_mask.{stage - 1}"][self.b]
        )
        return np.flatnonzero(past)

    def _cache(self, name: str) -> Array:
        return self.feeds[f"past_key_values.{name}"][self.b].astype(float)

    def _heads(self, flat: Array, name: str, count: int) -> Array:
        """[S,count,d], normed and turned."""
        states = flat.reshape(len(flat), count, self.it.head_width)
        if self.it.qk_norm != "none":
            first_turned = self.it.rope_form == "parts_rows" and self.it.qk_norm == "heads"
            if first_turned:
                return self._norm(self._turned(states), name)
            states = self._norm(states, name)
        return self._turned(states)

    def _turned(self, states: Array) -> Array:
        it, half = self.it, self.it.rotated // 2
        if not half:
            return states
        cos, sin = (table[:, None, :] for table in self._tables())
        places = np.arange(half)
        low, high = (
            (2 * places, 2 * places + 1) if it.rope == "interleaved" else (places, places + half)
        )
        turned = states.copy()
        turned[..., low] = states[..., low] * cos - states[..., high] * sin
        turned[..., high] = states[..., high] * cos + states[..., low] * sin
        return turned

    def _tables(self) -> tuple[Array, Array]:
        it = self.it
        if it.tables == "given":
            cos, sin = (self.feeds[name][self.b, self.columns] for name in ("cos", "sin"))
            return cos.astype(float), sin.astype(float)
        if it.tables == "looked_up":
            return self.weights["cos_table"][self.positions], self.weights["sin_table"][
                self.positions
            ]
        own = self.positions
        if it.is_mrope:
            component = np.repeat(np.arange(3), it.sections)
            angles = own[component].T * self.weights["frequencies"]
        else:
            angles = own[:, None] * self.weights["frequencies"]
        return np.cos(angles), np.sin(angles)

    # --- the cut ---

    def _narrow(self, cut: Cut, odds: Array) -> Array:
        """Which rows survive; from here on only they exist."""
        past = odds.shape[2] - len(self.columns)
        vision = [i for i, column in enumerate(self.columns) if column in set(self.tokens)]
        if self.forced is None:
            score = self._score(odds, vision)[[past + i for i in vision]] if vision else np.zeros(0)
            chosen = {vision[entry] for entry in self._best(cut, score, vision)}
        else:
            chosen = {i for i in vision if self.columns[i] in self.forced[self.stage]}
        alive = np.array([i for i in range(len(self.columns)) if i in chosen or i not in vision])
        self.columns, self.positions = self.columns[alive], self.positions[..., alive]
        self.stage += 1
        self.found.columns.append([int(column) for column in self.columns])
        if self.schedule.positions == "repacked":
            self.positions = len(self._past_mask(self.stage)) + np.arange(len(alive))
        return alive

    def _score(self, odds: Array, vision: Sequence[int]) -> Array:
        """Of every key: mean over the rows that ask, of the heads' mean or maximum; or by rule."""
        last = len(self.columns) - 1
        rows = [last] if self.schedule.query == "last" else list(range(max(vision) + 1, last + 1))
        by_row = odds.mean(0) if self.schedule.heads == "mean" else odds.max(0)
        received = by_row[rows or [last]]
        if self.schedule.rule == "self_cross":
            return np.asarray(by_row[vision].sum(0) / len(vision) * received.sum(0))
        if self.schedule.rule == "redundancy":
            keys = [by_row.shape[1] - len(self.columns) + i for i in vision]
            given = np.zeros(by_row.shape[1])
            given[keys] = by_row[np.ix_(vision, keys)].sum(1) / len(vision)
            return np.asarray(0.4 * received.mean(0) - 0.6 * given)
        return np.asarray(received.mean(0))

    def _best(self, cut: Cut, score: Array, vision: Sequence[int]) -> list[int]:
        """The entries that survive: the highest scores of the row, or of each image."""
        groups, keep = [list(range(len(score)))], cut.keep.of(len(self.tokens))
        if self.schedule.rank == "per_image":
            size = self.schedule.tokens_per_image or 1
            image = [self.tokens.index(int(self.columns[i])) // size for i in vision]
            groups = [[e for e, own in enumerate(image) if own == n] for n in sorted(set(image))]
            keep = cut.keep.of(size)
        chosen = []
        for group in groups:
            order = sorted(group, key=lambda entry: (-score[entry], entry))
            chosen += order[:keep]
            if 0 < keep < len(order):
                gap = score[order[keep - 1]] - score[order[keep]]
                self.found.margin = min(self.found.margin, float(gap))
        return chosen


def _erf(x: float) -> float:
    from math import erf

    return erf(x)
