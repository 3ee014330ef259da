"""The decoder and its cache: what it presents is what it is given next; it knows no cuts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from vtr_export.errors import ArtifactError
from vtr_export.runtime import beside
from vtr_export.runtime.batch import Ints, positions
from vtr_export.runtime.crossing import Crossed
from vtr_export.runtime.positions import Places
from vtr_export.runtime.session import Array, Resident, Session, Value

_CARRIED = {"present.": "past_key_values.", "present_mask.": "past_mask."}
_KEPT, _PLANE = "kept.", "deepstack."
PROTECTED: Final = "protected"
_STATES, _CROSSED = "cross_states", "cross_past"


@dataclass(frozen=True)
class Cache:
    """What one call leaves for the next: opaque tensors by input name, and the unpruned mask."""

    values: Mapping[str, Value] = field(repr=False)
    attention_mask: Ints  # [B, P] of all columns ever given, 1 = real
    ahead: Ints  # [B] by how much the next position differs from the number of real tokens so far

    @property
    def lengths(self) -> Ints:
        """``[B]``: real tokens of each row so far."""
        total: Ints = self.attention_mask.sum(axis=1)
        return total

    @property
    def next_positions(self) -> Ints:
        """``[B]``: what the rotary embedding of the next token turns by."""
        return self.lengths + self.ahead


@dataclass(frozen=True)
class Step:
    """One call's result."""

    logits: Array  # [B, vocab] fp32, of each row's last token
    cache: Cache
    kept: tuple[Ints, ...] = ()  # cut J: [B, S_{J+1}] columns of stage J's sequence, or its keys
    numbers: Ints | None = None  # [B, V] which of a row's vision tokens is in a column of keys


class Decoder:
    """A session with the inputs and outputs of a decoder graph, whatever their number."""

    def __init__(
        self,
        session: Session,
        compaction: Session | None = None,
        *,
        keep: Ints | None = None,
        first_position: int = 0,
    ) -> None:
        """``compaction`` is the graph that runs behind a prefill and narrows the cache.

        ``keep``: the numerators a tunable graph takes; positions count from the first one.
        """
        self.session, self._keep, self._first = session, keep, first_position
        self._compaction = compaction
        self._carried = {
            output: past + output.removeprefix(present)
            for present, past in _CARRIED.items()
            for output in session.outputs
            if output.startswith(present)
        }
        lacking = set(self._carried.values()) ^ {
            name for name in session.inputs if name.startswith(tuple(_CARRIED.values()))
        }
        if lacking:
            raise ArtifactError(
                f"the decoder's cache does not close: {', '.join(sorted(lacking))}",
                hint="run it with the vtr-export that made it, or export it again",
            )
        kept = (name for name in session.outputs if name.startswith(_KEPT))
        self._kept = sorted(kept, key=lambda name: int(name.removeprefix(_KEPT)))
        self.beside = [name for name in session.inputs if name in beside.NAMES]
        self.planes = sum(name.startswith(_PLANE) for name in session.inputs)

    def with_keep(self, keep: Ints) -> "Decoder":
        """The same graphs, keeping something else."""
        return Decoder(self.session, self._compaction, keep=keep, first_position=self._first)

    @property
    def cuts(self) -> int:
        """How many cuts report what they kept."""
        return len(self._kept)

    @property
    def embedding_dtype(self) -> str:
        """What ``inputs_embeds`` must be."""
        return self.session.inputs["inputs_embeds"].dtype

    def empty(self, batch: int) -> Cache:
        """The cache before the first call: every dimension that grows is zero.

        That of vision keys is one, of zeros, which nobody sees who sees another.
        """
        values: dict[str, Value] = {}
        for name in (*self._carried.values(), *self.beside):
            port = self.session.inputs[name]
            tail = (_length(size) for size in port.shape[1:])
            dtype = "float32" if port.dtype == "bfloat16" else port.dtype
            values[name] = np.zeros((batch, *tail), dtype)
        ahead = np.full(batch, self._first, np.int64)
        return Cache(values, np.zeros((batch, 0), np.int64), ahead)

    def with_images(self, cache: Cache, features: Array, mask: Ints, index: Ints) -> Cache:
        """``cache`` before a first call, with what stays beside its tokens. InputError.

        ``index`` ``[B, n]`` are the columns of the tokens that stand for images.
        """
        beside.check_first(cache.lengths)
        if beside.WEIGHTS in self.beside:
            laid = beside.weights(features, mask)
        else:
            laid = beside.keys(features, mask, index)
        return replace(cache, values={**cache.values, **laid})

    def __call__(
        self,
        cache: Cache,
        inputs_embeds: Array,
        mask: Ints,
        vision_index: Ints,
        places: Places | None = None,
        groups: Ints | None = None,
        crossed: Crossed | None = None,
        *,
        protected: Ints | None = None,
        kept: bool = False,
    ) -> Step:
        """Feed columns ``[B, S, D]``; ``mask`` ``[B, S]`` and ``vision_index`` are of these.

        Where the decoder adds planes behind its first layers, they may stand behind the columns:
        ``[B, S, (1 + n) D]``; without, nothing is added.
        ``places`` are their positions, where they do not count on; ``groups`` ``[B, S]`` says
        who sees what comes behind (None: nobody). ``crossed`` is what cross-attention reads (None:
        nothing new). ``protected`` ``[B, V]``: 1 = a vision token that no cut drops (None: none).
        ``kept`` asks what each cut kept: of a prefill, behind which the cache is
        compacted where the schedule says so.
        """
        whole = np.concatenate((cache.attention_mask, mask), axis=1)
        ids = self._positions(cache, whole, mask.shape[1]) if places is None else places.ids
        ahead = cache.ahead if places is None else places.following - whole.sum(axis=1)
        feeds: dict[str, Value] = {
            **self._spread(inputs_embeds),
            "attention_mask": whole,
            "position_ids": ids,
            "vision_index": vision_index,
            "token_groups": np.zeros_like(mask) if groups is None else groups,
            **cache.values,
        }
        if PROTECTED in self.session.inputs:
            feeds[PROTECTED] = np.zeros_like(vision_index) if protected is None else protected
        if _STATES in self.session.inputs:
            feeds |= self._crossed(crossed, mask, inputs_embeds)
        if "keep" in self.session.inputs and self._keep is not None:
            feeds["keep"] = self._keep
        feeds = {name: feeds[name] for name in self.session.inputs}
        asked = ["logits", *self._carried, *(self._kept if kept else ())]
        results = self.session.run(feeds, asked, resident=self._carried)
        values = {past: results[present] for present, past in self._carried.items()}
        values |= {name: cache.values[name] for name in self.beside}
        if self._compaction is not None and kept and vision_index.shape[1]:
            values |= _compacted(self._compaction, results)
        logits = np.asarray(results["logits"], np.float32)[:, -1]
        reported = tuple(np.asarray(results[name]) for name in asked if name.startswith(_KEPT))
        return Step(logits, Cache(values, whole, ahead), reported)

    def _spread(self, embeds: Array) -> dict[str, Value]:
        """Embeddings and planes by the names of their inputs."""
        if not self.planes:
            return {"inputs_embeds": embeds}
        names = ["inputs_embeds", *(f"{_PLANE}{number}" for number in range(self.planes))]
        if embeds.shape[-1] == self.session.inputs["inputs_embeds"].shape[-1]:
            embeds = np.concatenate((embeds, *[np.zeros_like(embeds)] * self.planes), axis=-1)
        parts = np.split(embeds, len(names), axis=-1)
        return {n: np.ascontiguousarray(part) for n, part in zip(names, parts, strict=True)}

    def _crossed(self, crossed: Crossed | None, mask: Ints, embeds: Array) -> dict[str, Value]:
        """Features as keys, and who sees them."""
        if crossed is None:
            width = self.session.inputs[_STATES].shape[-1]
            assert isinstance(width, int), "a decoder's width is known"
            states = np.zeros((len(mask), 0, width), embeds.dtype)
            crossed = Crossed(states, np.zeros((*mask.shape, 0), np.bool_), np.ones_like(mask))
        states = crossed.states.astype(embeds.dtype, copy=False)
        return {_STATES: states, "cross_mask": crossed.seen, "cross_rows": crossed.rows}

    def _positions(self, cache: Cache, whole: Ints, length: int) -> Ints:
        """Counted on from what came before; ``[B, S]``, or several times that."""
        ids = positions(whole, length) + cache.ahead[:, None]
        shape = self.session.inputs["position_ids"].shape
        sections = shape[0] if len(shape) == 3 and isinstance(shape[0], int) else 3
        return np.stack([ids] * sections) if len(shape) == 3 else ids


def _compacted(compaction: Session, results: Mapping[str, Value]) -> dict[str, Value]:
    """The caches that a prefill leaves too long, as the next call takes them."""
    feeds = {name: results[name] for name in compaction.inputs}
    stays = any(isinstance(value, Resident) for value in feeds.values())
    return compaction.run(feeds, resident=compaction.outputs if stays else ())


def _length(size: object) -> int:
    """Of a dimension of an empty cache."""
    if isinstance(size, int):
        return size
    return int(str(size).startswith(_CROSSED))
