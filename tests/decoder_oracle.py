"""The small decoder of ``graphs/insert_cuts`` with cuts, in numpy and from its definition."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from block_oracle import block_scores, clear, correlations, divided, given, merged
from cut_oracle import Array, Call, ranked, scored, selected, visible

from vtr_export import ops
from vtr_export.schedule import Cut, Resolved
from vtr_export.schedule_document import Correlate

EPSILON = 1e-5
PAD_SCORE = -2


@dataclass(frozen=True)
class Rows:
    """What has a token axis: hidden states [B,S,D], positions [B,S], and whose rows they are.

    Tokens of one number in ``groups`` [B,S] see each other; 0 is no group.
    """

    hidden: Array
    positions: Array
    call: Call
    groups: Array


@dataclass
class Decoded:
    """Outputs by name; ``margin``: the least difference between a kept and a dropped score."""

    outputs: dict[str, Array] = field(default_factory=dict)
    margin: float = np.inf


class Oracle:
    """One call under a schedule; ``feeds`` as the graph takes them, in double precision."""

    def __init__(
        self,
        schedule: Resolved,
        feeds: Mapping[str, Array],
        call: Call,
        softcap: float | None = None,
    ) -> None:
        self.schedule, self.call, self.softcap = schedule, call, softcap
        self.cuts = {cut.before_layer: cut for cut in schedule.cuts}
        self.feeds = {
            name: array.astype(float) if array.dtype == np.float32 else array
            for name, array in feeds.items()
        }
        self.found, self.stage = Decoded(), 0

    def decode(self) -> Decoded:
        """Layer after layer."""
        groups = self.feeds.get("token_groups", np.zeros_like(self.call.current))
        rows = Rows(self.feeds["inputs_embeds"], self.feeds["position_ids"], self.call, groups)
        for index in range(self.schedule.layers):
            rows = self._layer(index, rows)
        self.found.outputs["logits"] = rows.hidden[:, -1:] @ self.feeds["head"]
        return self.found

    def _layer(self, index: int, rows: Rows) -> Rows:
        is_next, kept = self.schedule.source == "next", None
        if is_next and index in self.cuts:
            deeper = Call(self._past(self.stage + 1), rows.call.current, rows.call.vision)
            query, keys, _ = self._project(index, rows)
            chosen = self._choose(self.cuts[index], query, keys, deeper, rows.groups)
            rows = self._narrow(rows, chosen)
        query, keys, values = self._project(index, rows)
        self.found.outputs |= {f"present.{index}.key": keys, f"present.{index}.value": values}
        mask = visible(rows.call.padding, query.shape[2], rows.groups)
        mixed = attend(query, keys, values, mask, self.softcap)
        if not is_next and index + 1 in self.cuts:
            kept = self._choose(self.cuts[index + 1], query, keys, rows.call, rows.groups)
        if kept is not None and self.schedule.drop_point == "inside":
            mixed, rows, kept = take(mixed, kept[0]), self._narrow(rows, kept), None
        hidden = rows.hidden + mixed @ self._weight("wo", index)
        if kept is not None and isinstance(self.schedule.merge, Correlate):
            assert self.schedule.drop_point == "attended"
            hidden = self._merged(hidden, rows, kept[0], query, keys)
        if kept is not None and self.schedule.drop_point == "attended":
            hidden, rows, kept = take(hidden, kept[0]), self._narrow(rows, kept), None
        hidden = hidden + np.tanh(hidden @ self._weight("wm", index))
        rows = Rows(hidden, rows.positions, rows.call, rows.groups)
        return rows if kept is None else self._narrow(rows, kept)

    def _weight(self, name: str, index: int) -> Array:
        return self.feeds[f"{name}_{index}"]

    def _past(self, stage: int) -> Array:
        return self.feeds[f"past_mask.{stage - 1}"]

    def _project(self, index: int, rows: Rows) -> tuple[Array, Array, Array]:
        """Rotated query [B,H,S,d], and keys and values [B,kv,T,d] behind the past's."""
        hidden, width = rows.hidden, 2 * self.feeds["frequencies"].shape[0]
        norm = np.sqrt((hidden**2).mean(-1, keepdims=True) + EPSILON)
        normed = hidden / norm * self._weight("norm", index)
        angles = rows.positions[:, None, :, None] * self.feeds["frequencies"]
        query, key, value = (
            split(normed @ self._weight(name, index), width) for name in ("wq", "wk", "wv")
        )
        past_key, past_value = (
            self.feeds[f"past_key_values.{index}.{part}"] for part in ("key", "value")
        )
        keys = np.concatenate([past_key, rotate(key, angles)], 2)
        return rotate(query, angles), keys, np.concatenate([past_value, value], 2)

    def _choose(
        self, cut: Cut, query: Array, keys: Array, call: Call, groups: Array
    ) -> tuple[Array, Array]:
        """Surviving columns, and where the vision tokens stand among them."""
        schedule, columns = self.schedule, self.call.vision.shape[1]
        said = schedule.query, schedule.heads, schedule.rank
        choice = ops.Choice(*said, softcap=self.softcap, rule=schedule.rule)
        rank = scored if schedule.rule == "attention" else block_scores
        score = rank(call, query, keys, query.shape[-1] ** -0.5, choice, groups)
        keep, chosen = cut.keep.of(columns), []
        images = columns // (schedule.tokens_per_image or 1) if schedule.rank == "per_image" else 1
        for b, count in enumerate(self.call.counts):
            ranked_apart = np.split(score[b], images) if images else []
            share = keep // images if images else 0
            budget = share if schedule.rank == "per_image" else cut.keep.of(int(count))
            for group in ranked_apart:
                self.found.margin = min(self.found.margin, margin_of(group, budget))
            chosen.append(
                [
                    number * len(group) + entry
                    for number, group in enumerate(ranked_apart)
                    for entry in ranked(group, share, budget)
                ]
            )
        return selected(call, chosen)

    def _merged(
        self, hidden: Array, rows: Rows, columns: Array, query: Array, keys: Array
    ) -> Array:
        """``hidden`` with dropped vision rows added to those they are correlated with."""
        schedule, merge = self.schedule, self.schedule.merge
        assert isinstance(merge, Correlate)
        choice = ops.Choice(schedule.query, schedule.heads, softcap=self.softcap)
        after = hidden.copy()
        for b in range(len(hidden)):
            scale = query.shape[-1] ** -0.5
            found = given(rows.call, b, query, keys, scale, choice, rows.groups)
            kept = [column in columns[b] for column in found.columns]
            correlation = correlations(found, merge.direct)
            self.found.margin = min(self.found.margin, clear(correlation, kept, merge.nearest))
            shares = divided(correlation, kept, merge.nearest)
            after[b, found.columns] = merged(hidden[b, found.columns], shares)
        return after

    def _narrow(self, rows: Rows, kept: tuple[Array, Array]) -> Rows:
        """The rows that survive, in the next stage."""
        self.stage += 1
        columns, vision = kept
        current = take(rows.call.current, columns)
        current[:, :-1] *= columns[:, :-1] < columns[:, 1:]  # what stands in for a pad is one
        call = Call(self._past(self.stage), current, vision)
        positions = take(rows.positions, columns)
        if self.schedule.positions == "repacked":
            counted = np.maximum(np.cumsum(call.padding, 1) - 1, 0)
            positions = counted[:, call.past.shape[1] :]
        number = self.stage - 1
        self.found.outputs |= {f"present_mask.{number}": call.padding, f"kept.{number}": columns}
        return Rows(take(rows.hidden, columns), positions, call, take(rows.groups, columns))


def split(rows: Array, width: int) -> Array:
    """[B,S,H·d] → [B,H,S,d]."""
    return rows.reshape(*rows.shape[:2], -1, width).transpose(0, 2, 1, 3)


def rotate(states: Array, angles: Array) -> Array:
    """Entry i and entry i + d/2 turned by angle i."""
    low, high = np.split(states, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


def attend(
    query: Array, keys: Array, values: Array, mask: Array, softcap: float | None = None
) -> Array:
    """Softmax over the visible keys, times their values: [B,S,H·d]."""
    batch, heads, rows, width = query.shape
    mixed = np.zeros((batch, rows, heads * width))
    group = heads // keys.shape[1]
    for b, h, i in np.ndindex(batch, heads, rows):
        seen = mask[b, 0, i]
        logits = keys[b, h // group, seen] @ query[b, h, i] * width**-0.5
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        odds = np.exp(logits - logits.max())
        mixed[b, i, h * width : (h + 1) * width] = odds / odds.sum() @ values[b, h // group, seen]
    return mixed


def take(stream: Array, columns: Array) -> Array:
    """Row by row."""
    return np.stack([row[at] for row, at in zip(stream, columns, strict=True)])


def margin_of(score: Array, budget: int) -> float:
    """The worst of the ``budget`` best scores minus the best of the others; pads do not count."""
    best = np.sort(score)[::-1]
    if budget in (0, len(best)) or best[budget - 1] == PAD_SCORE:
        return np.inf
    return float(best[budget - 1] - best[budget])


def drawn(inputs: Mapping[str, Any], call: Call, seed: int) -> dict[str, Array]:
    """Random weights, and random pasts of a length of their own for every stage."""
    rng = np.random.default_rng(seed)
    batch, past, length, _ = call.sizes
    lengths: dict[str, int] = {"batch": batch, "past": past}
    feeds: dict[str, Array] = {
        "inputs_embeds": rng.normal(size=(batch, length, 4)).astype(np.float32),
        "attention_mask": call.padding,
        "position_ids": np.maximum(np.cumsum(call.padding, 1) - 1, 0)[:, past:],
        "vision_index": call.vision,
    }
    if "token_groups" in inputs:
        feeds["token_groups"] = rng.integers(0, 3, (batch, length)) * call.current
    if "protected" in inputs:
        real = np.take_along_axis(call.current, call.vision, 1)
        feeds["protected"] = (rng.random(real.shape) < 0.2) * real
    for name, value in inputs.items():
        if name in feeds or name == "keep":
            continue
        shape = [
            dim if isinstance(dim, int) else lengths.setdefault(dim, int(rng.integers(0, 4)))
            for dim in value.shape
        ]
        feeds[name] = (
            rng.integers(0, 2, shape)
            if name.startswith("past_mask")
            else rng.normal(size=shape).astype(np.float32)
        )
    return feeds
