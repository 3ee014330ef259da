"""One call with its decode steps, and what the reference made of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vtr_export.runtime.positions import Places

Array: TypeAlias = NDArray[Any]
Ints: TypeAlias = NDArray[np.int64]

TOP, SPREAD = 32, 224  # logits of a position that golden vectors hold: the best, and a sample
FEATURES = 1 << 16  # values of the image features they hold


@dataclass(frozen=True)
class Question:
    """What goes in: B prompts side by side, left-padded, and their images in reading order."""

    name: str
    images: Mapping[str, Array]  # what the vision encoder is fed, by name
    given: Mapping[str, Array]  # what transformers' processor makes of the same images
    input_ids: Ints  # [B, S]
    attention_mask: Ints  # [B, S] 1 = real
    position_ids: Ints  # [B, S], or [3, B, S]
    following: Ints  # [B] the position after the prompt
    vision_index: Ints  # [B, V]
    groups: Ints  # [B, S] tokens of one number, but 0, see each other
    # where images are keys: features [B, V], seen [B, S, V], rows [B, S], as ``crossing.Keys``
    crossing: Mapping[str, Array] = field(default_factory=dict)
    # [tokens, D] what the vision encoder left, where a schedule reduces: what the decoder is given
    features: Array | None = None
    protected: Ints | None = None  # [B, V] 1 = no cut drops it, where a schedule protects some

    def cut_columns(self, row: int) -> tuple[int, Ints, Ints]:
        """Columns that cuts narrow: their number, those that are ranked, and those no pads."""
        if self.crossing:
            seen = self.crossing["seen"][row, -1]
            return len(seen), np.arange(len(seen)), np.flatnonzero(seen)
        index = self.vision_index[row]
        return self.input_ids.shape[1], index, index[self.attention_mask[row, index] != 0]

    @property
    def places(self) -> Places:
        """The positions, as a decoder is given them."""
        return Places(self.position_ids, self.following)

    @property
    def real_vision(self) -> NDArray[np.bool_]:
        """``[B, V]``: entries of the vision index that are no pads."""
        real: NDArray[np.bool_] = np.take_along_axis(self.attention_mask, self.vision_index, 1) != 0
        return real


@dataclass(frozen=True)
class Trace:
    """What only a failure is explained with, and no golden vector holds."""

    text_embeds: Array  # [B, S, D] before image features come in; zeros in their places
    streams: Array  # [1 + n, layers + 1, B, D] the last row: into each layer, and the final norm


@dataclass(frozen=True)
class Case:
    """A question and the reference's answer. Tuples hold one entry a cut, as in its ``Step``."""

    question: Question
    tokens: Ints  # [B, n] the reference's own choices, fed to both
    logits: Array  # [B, 1 + n, m] fp32: prefill, then each step
    logit_ids: Ints  # [B, 1 + n, m] the ids these logits belong to, the best first
    features: Array  # fp32: [m], every so many of all; [m, D], of tokens that a schedule chose
    kept: tuple[Ints, ...]
    kept_vision: tuple[Ints, ...]
    scores: tuple[Array, ...]
    margins: tuple[Array, ...]
    ties: tuple[Ints, ...]  # kept when every score is NaN: then only the order of columns decides
    labels: tuple[Ints, ...] = ()  # where tokens are recycled
    by_threshold: bool = False  # scores are how many times a threshold: from 1 on a token stays
    trace: Trace | None = None

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.tokens)


def sampled(features: Array, *, rows: bool = False) -> Array:
    """At most FEATURES values, evenly spaced over all; of whole ``rows`` ``[n, D]``, if asked."""
    if rows:
        wide = features.reshape(-1, features.shape[-1])
        most = max(FEATURES // wide.shape[1], 1)
        return wide[np.unique(np.linspace(0, max(len(wide) - 1, 0), most).astype(np.int64))]
    flat = features.reshape(-1)
    if flat.size <= FEATURES:
        return flat
    return flat[np.linspace(0, flat.size - 1, FEATURES).astype(np.int64)]


def noted(logits: Array) -> tuple[Array, Ints]:
    """The TOP best logits and SPREAD evenly spaced ones of each position, and their ids."""
    vocab = logits.shape[-1]
    order = np.argsort(-logits, axis=-1, kind="stable").astype(np.int64)
    if vocab <= TOP + SPREAD:
        ids = order
    else:
        spread = np.linspace(0, vocab - 1, SPREAD).astype(np.int64)
        tail = np.broadcast_to(spread, (*logits.shape[:-1], SPREAD))
        ids = np.concatenate((order[..., :TOP], tail), axis=-1)
    return np.take_along_axis(logits, ids, -1), ids
