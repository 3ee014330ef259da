"""Images as keys of cross-attention: what a call reads of them, and a cut of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from vtr_export.reference.cut import (
    Budget,
    Streams,
    is_among,
    is_stand_in,
    margin_of,
    rows_at,
    select,
    survivors,
)
from vtr_export.reference.layers import Attention, Layers
from vtr_export.schedule import Cut, Resolved


@dataclass(frozen=True)
class Crossing:
    """What the images of one call are to its rows.

    Keys that the last row does not see stand before those it does; pads, of zeros, come first.
    """

    states: Tensor  # [B, V, D]
    seen: Tensor  # [B, S, V] bool
    rows: Tensor  # [B, S] bool: the rest of a cross layer counts in it
    features: Tensor  # [B, V] which of all features that is; -1: a pad

    @classmethod
    def nothing(cls, like: Tensor, decoder: Any) -> "Crossing":
        """No image, for rows ``[B, S, D]`` of a decoder."""
        batch, length, width = like.shape
        width = getattr(decoder, "cross_width", width)  # where features are not as wide
        return cls(
            like.new_zeros((batch, 0, width)),
            torch.zeros((batch, length, 0), dtype=torch.bool, device=like.device),
            torch.ones((batch, length), dtype=torch.bool, device=like.device),
            torch.zeros((batch, 0), dtype=torch.int64, device=like.device),
        )

    def handed(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        """What layers are called with beside text; ``rows`` ``[B, S]`` are those that count."""
        rows = (self.rows if rows is None else rows)[:, None, :, None]
        counted = rows.to(self.states.dtype)
        return {
            "cross_attention_states": self.states,
            "full_text_row_masked_out_mask": counted,
        }

    def at(self, kept: Tensor) -> "Crossing":
        """The columns ``kept`` ``[B, k]``; what stands in for one is seen by nobody."""
        seen = torch.stack([row[:, at] for row, at in zip(self.seen, kept, strict=True)])
        seen = seen & ~is_stand_in(kept)[:, None]
        return Crossing(rows_at(self.states, kept), seen, self.rows, self.features.gather(1, kept))


def crossing_for(model: Any, ids: Tensor, mask: Tensor, given: Mapping[str, Any]) -> Crossing:
    """Of a first call, by transformers' own rules for who sees which image.

    Keys that no row sees are left out.
    """
    from vtr_export.reference.inputs import image_features

    features = image_features(model, given)
    each, real = len(features) // len(ids), mask != 0
    sight_of = _mllama_sight if model.config.model_type == "mllama" else _idefics_sight
    seen, rows = sight_of(model, ids, given)
    seen = seen & real[:, :, None]
    found = []
    for row in seen:
        order = row[-1].int().sort(stable=True).indices
        found.append(order[row[:, order].any(0)])
    width = max(map(len, found))
    places = torch.full((len(ids), width), -1)
    sight = torch.zeros((*ids.shape, width), dtype=torch.bool)
    for row, order in enumerate(found):
        places[row, width - len(order) :] = row * each + order
        sight[row, :, width - len(order) :] = seen[row][:, order]
    states = torch.where((places >= 0)[..., None], features[places], 0)
    return Crossing(states, sight, rows & real, places)


def _mllama_sight(model: Any, ids: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """``[B, S, V]`` and ``[B, S]``: what transformers' processor and model make of the prompt."""
    from transformers.models.mllama import modeling_mllama as modeling
    from transformers.models.mllama import processing_mllama as processing

    tiles = torch.as_tensor(given["aspect_ratio_mask"])
    places = [
        processing.get_cross_attention_token_mask(row, model.config.image_token_id)
        for row in ids.tolist()
    ]
    dense = processing.convert_sparse_cross_attention_mask_to_dense(
        places, tiles.sum(-1).tolist(), tiles.shape[-1], ids.shape[1]
    )
    added, rows = modeling._prepare_cross_attention_mask(
        torch.as_tensor(dense), model.model.vision_model.num_patches, torch.float32
    )
    return added[:, 0] == 0, rows[:, 0, :, 0] != 0


def _idefics_sight(model: Any, ids: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The same of Idefics; rows of the batch have equally many images."""
    from transformers.models.idefics import processing_idefics as processing

    config, images = model.config, len(given["pixel_values"]) // len(ids)
    words = SimpleNamespace(
        convert_tokens_to_ids=lambda _: config.image_token_id, eos_token_id=config.eos_token_id
    )
    counted, _ = processing.image_attention_mask_for_packed_input_ids(ids, words, "pt")
    sees = processing.incremental_to_binary_attention_mask(counted, "pt", num_classes=images)
    vision, perceiver = config.vision_config, config.perceiver_config
    each = (vision.image_size // vision.patch_size) ** 2 + 1
    each = perceiver.resampler_n_latents if config.use_resampler else each
    return sees.repeat_interleave(each, 2) != 0, sees.any(2)


class Past(Protocol):
    """What earlier calls left behind."""

    @property
    def padding(self) -> tuple[Tensor, ...]:
        """The attention mask, then ``[B, P]`` of each stage: which vision keys are seen."""
        ...

    def of(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values of one layer."""
        ...


@dataclass
class Walk:
    """A call's vision keys on their way through the cross layers.

    ``decided`` is what each cut kept ``[B, k]``, by what margin ``[B]``, and its scores ``[B, V]``.
    """

    schedule: Resolved
    now: Crossing
    past: Past
    forced: Sequence[Tensor] | None = None
    decided: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    kept_vision: list[Tensor] = field(default_factory=list)
    padding: list[Tensor] = field(default_factory=list)
    budget: Budget = (0, [])
    _score: Tensor | None = None

    def __post_init__(self) -> None:
        self.budget = self.now.states.shape[1], self._real().sum(1).tolist()
        self._pad()

    def visible(self) -> Tensor:
        """``[B, S, T]``: all rows see what the last row of earlier calls saw."""
        old = self._seen_before()[:, None] != 0
        return torch.cat((old.expand(-1, self.now.seen.shape[1], -1), self.now.seen), 2)

    def handed(self) -> dict[str, Tensor]:
        """What a cross layer is called with; a row that sees nothing is left as it is."""
        return self.now.handed(self.now.rows & self.visible().any(-1))

    def note(self, attention: Attention) -> None:
        """Score the keys of this call, as the last row of ``attention`` sees them."""
        keys = attention.for_each_head(attention.keys).float()
        logits = attention.logits(attention.query[:, :, -1:].float(), keys)
        logits = logits.masked_fill(~attention.visible[:, None, -1:], -torch.inf)
        by_head = logits.softmax(-1)[:, :, 0]
        score = by_head.mean(1) if self.schedule.heads == "mean" else by_head.amax(1)
        score = score[:, score.shape[1] - self.now.states.shape[1] :]
        score = torch.where(score.isnan(), -1.0, score)
        self._score = torch.where(self._real(), score, -2.0)

    def cut(self, cut: Cut) -> None:
        """Select, note down what was decided, and go on with what is left."""
        score, batch = self._score, len(self.now.states)
        assert score is not None, "a cross layer stands before every cut"
        columns = torch.arange(score.shape[1]).expand(batch, -1)
        if self.forced is None:
            chosen = select(score, self._real(), cut.keep, self.budget, 1)
            current = self._real().long()
            streams = Streams(self.now.states, current, columns, columns, torch.zeros_like(columns))
            kept = survivors(streams, chosen)
        else:
            kept = self.forced[len(self.decided)]
        self.decided.append((kept, margin_of(score, is_among(columns, kept), 1), score))
        self.kept_vision.append(torch.arange(kept.shape[1]).expand_as(kept))
        self.now = self.now.at(kept)
        if cut.keep.numerator < cut.keep.denominator:  # what nobody ranked is dropped
            self.now = replace(self.now, seen=self.now.seen & self._real()[:, None])
        self._pad()

    def _real(self) -> Tensor:
        """``[B, V]``: what the last row sees."""
        return self.now.seen[:, -1]

    def _pad(self) -> None:
        self.padding.append(torch.cat((self._seen_before(), self._real().long()), 1))

    def _seen_before(self) -> Tensor:
        """``[B, P]``: which keys of earlier calls are seen, in this stage."""
        return self.past.padding[1 + len(self.decided)]


def run_crossed(
    layers: Layers, streams: Streams, causal: Tensor, walk: Walk
) -> tuple[Streams, list[tuple[Tensor, Tensor]]]:
    """All layers, and the keys and values of each; those that cross see what the walk has left.

    A cut narrows vision keys, and text stays.
    """
    cuts = {cut.before_layer: cut for cut in walk.schedule.cuts}
    _, handed = layers.hand(streams.hidden, streams.positions, streams.groups, walk.handed())
    states = []
    for index in range(len(layers)):
        if index in cuts:
            walk.cut(cuts[index])
        crosses, own = index in walk.schedule.crosses, handed[index]
        visible = walk.visible() if crosses else causal
        given = {index: {**own, **walk.handed()} if crosses else own}
        past = walk.past.of(index)
        hidden, attention, kept = layers.run(index, streams.hidden, given, past, visible)
        states.append(kept)
        if crosses:
            walk.note(attention)
        streams = replace(streams, hidden=hidden)
    return streams, states
