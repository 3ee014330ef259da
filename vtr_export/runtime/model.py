"""The three graphs of an artifact as one model: images and token ids in, logits out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtr_export.errors import ArtifactError, InputError
from vtr_export.families import Attends, Sight
from vtr_export.runtime.batch import Batch, Ints, flagged, pad_batch, token_groups
from vtr_export.runtime.crossing import Crossed, Keys, lay_out
from vtr_export.runtime.decoder import PROTECTED, Cache, Decoder, Step
from vtr_export.runtime.encoder import Encoded, encode, image_by_image
from vtr_export.runtime.images import Seen
from vtr_export.runtime.positions import mrope
from vtr_export.runtime.session import Array, Session


@dataclass(frozen=True)
class Model:
    """Vision encoder, embedding table and decoder. ``image_token_id`` marks an image's places.

    ``sight``: images are keys of cross-attention, and what a token sees of them; None: tokens.
    """

    vision: Session
    embedding: Session
    decoder: Decoder
    image_token_id: int | None
    pad_token_id: int = 0
    mrope: bool = False
    attends: Attends = "causal"
    sight: Sight | None = None
    marked: tuple[int, ...] = ()

    def encode(self, feeds: Mapping[str, Array]) -> Encoded:
        """The vision tokens of all images, in order."""
        return encode(self.vision, feeds)

    def misfits(self, feeds: Mapping[str, Array]) -> list[str]:
        """What the vision encoder does not take, in words."""
        ports = self.vision.inputs
        if ports.keys() != feeds.keys():
            return [f"the vision encoder takes {', '.join(ports)}, not {', '.join(feeds)}"]
        feeds = image_by_image(ports, feeds)[0]
        return [
            f"{name} is {list(feeds[name].shape)}, the vision encoder takes {list(port.shape)}"
            for name, port in ports.items()
            if not _fits(feeds[name].shape, port.shape)
        ]

    def pad(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Rows of token ids as one call."""
        spread = self.image_token_id if self.sight is None else None
        return pad_batch(rows, self.pad_token_id, spread)

    def prefill(
        self,
        cache: Cache,
        batch: Batch,
        features: Array | None,
        images: Sequence[Seen] = (),
        *,
        protected: NDArray[np.bool_] | None = None,
    ) -> Step:
        """Feed prompts; ``features`` of the ``images`` are in reading order of the rows.

        So is ``protected`` [tokens], where the vision encoder tells it.
        """
        if self.sight is not None:
            return self._crossing(cache, batch, features, images)
        if self.decoder.beside:
            return self._beside(cache, batch, features)
        embeds = self._embed(batch, features)
        places = None
        if self.mrope and images:  # text alone counts on
            places = mrope(batch, self.image_token_id, images, cache.next_positions)
        mask, index = batch.attention_mask, batch.vision_index
        groups = token_groups(batch, self.image_token_id, self.attends, self.marked)
        flags = self._protected(batch, protected)
        asked = cache, embeds, mask, index, places, groups
        return self.decoder(*asked, protected=flags, kept=True)

    def _protected(self, batch: Batch, protected: NDArray[np.bool_] | None) -> Ints | None:
        """``[B, V]``, where the decoder asks which tokens are never dropped."""
        if PROTECTED not in self.decoder.session.inputs or not batch.vision_index.size:
            return None
        if protected is None:
            raise ArtifactError(
                "the decoder asks which vision tokens are protected, and nobody says it",
                hint="run the artifact as it was exported",
            )
        return flagged(batch.attention_mask, batch.vision_index, protected.astype(np.int64))

    def _beside(self, cache: Cache, batch: Batch, features: Array | None) -> Step:
        """A prefill whose images are given beside its tokens."""
        mask, index = batch.attention_mask, batch.vision_index
        if features is not None:
            cache = self.decoder.with_images(cache, features, mask, index)
        return self.decoder(cache, _only(self.embedding, batch.input_ids), mask, index, kept=True)

    def _crossing(
        self, cache: Cache, batch: Batch, features: Array | None, images: Sequence[Seen]
    ) -> Step:
        """A prefill whose images are keys; their places are tokens like any other."""
        embeds, mask = _only(self.embedding, batch.input_ids), batch.attention_mask
        if features is None:
            return self.decoder(cache, embeds, mask, batch.vision_index, kept=True)
        if cache.lengths.any():
            raise InputError(
                "a later turn brings an image, and earlier tokens of this model would see it",
                hint="give all images in the first turn, or begin a new conversation",
            )
        keys = self.keys(batch, features, images)
        crossed = Crossed(keys.states(features), keys.seen, keys.rows)
        index = batch.vision_index
        step = self.decoder(cache, embeds, mask, index, crossed=crossed, kept=True)
        return replace(step, numbers=keys.numbers)

    def keys(self, batch: Batch, features: Array, images: Sequence[Seen]) -> Keys:
        """Where the features of ``images`` stand among the keys of cross-attention."""
        assert self.sight is not None, "images are keys"
        return lay_out(batch, self.image_token_id, images, features.shape[1], self.sight)

    def extend(self, cache: Cache, tokens: Ints) -> Step:
        """Feed one more token ``[B]`` to each row."""
        column = tokens[:, None]
        embeds = _only(self.embedding, column)
        nothing = np.zeros((len(tokens), 0), np.int64)
        return self.decoder(cache, embeds, np.ones_like(column), nothing)

    def _embed(self, batch: Batch, features: Array | None) -> Array:
        """``[B, S, D]`` with the image features in their places; see ``put``."""
        is_vision = (batch.input_ids == self.image_token_id) & (batch.attention_mask == 1)
        ids = np.where(is_vision, self.pad_token_id, batch.input_ids)  # it may have no embedding
        embeds = np.array(_only(self.embedding, ids))
        given = 0 if features is None else features.size // features.shape[-1]
        if (places := int(is_vision.sum())) != given:
            raise ArtifactError(
                f"{given} image features for {places} places in the prompt",
                hint="the preprocessor's file belongs to another checkpoint",
            )
        return embeds if features is None else put(embeds, is_vision, features)


def put(embeds: Array, places: Any, features: Array) -> Array:
    """``[B, S, D]`` with ``features`` at ``places``.

    Features of ``(1 + n) D`` values bring planes with them, which are zeros elsewhere. What stands
    beside narrower ones (Gemma 4's embeddings for its layers) stays as it is.
    """
    rows = features.reshape(-1, features.shape[-1])
    beyond = max(rows.shape[1] - embeds.shape[2], 0)
    filled = np.pad(embeds, ((0, 0), (0, 0), (0, beyond)))
    filled[..., : rows.shape[1]][places] = rows.astype(embeds.dtype)
    return filled


def _fits(shape: Sequence[int], wanted: Sequence[object]) -> bool:
    """Where a dimension is a number, it is that number."""
    return len(shape) == len(wanted) and all(
        not isinstance(want, int) or size == want for size, want in zip(shape, wanted, strict=True)
    )


def _only(session: Session, value: Array) -> Array:
    """Run a graph of one input and one output."""
    (name,) = session.inputs
    (result,) = session.run({name: value}).values()
    return np.asarray(result)
