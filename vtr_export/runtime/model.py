"""The three graphs of an artifact as one model: images and token ids in, logits out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vtr_export.errors import ArtifactError
from vtr_export.runtime.batch import Batch, Ints, pad_batch
from vtr_export.runtime.decoder import Cache, Decoder, Step
from vtr_export.runtime.session import Array, Session


@dataclass(frozen=True)
class Model:
    """Vision encoder, embedding table and decoder. ``image_token_id`` marks an image's places."""

    vision: Session
    embedding: Session
    decoder: Decoder
    image_token_id: int | None
    pad_token_id: int = 0

    def encode(self, pixel_values: Array) -> Array:
        """``[images, tokens, D]`` of ``[images, 3, H, W]``."""
        return _only(self.vision, pixel_values)

    def image_size(self) -> tuple[int | None, int | None]:
        """Height and width the vision encoder takes; None where any will do."""
        height, width = next(iter(self.vision.inputs.values())).shape[-2:]
        return tuple(size if isinstance(size, int) else None for size in (height, width))  # type: ignore[return-value]

    def pad(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Rows of token ids as one call."""
        return pad_batch(rows, self.pad_token_id, self.image_token_id)

    def prefill(self, cache: Cache, batch: Batch, features: Array | None) -> Step:
        """Feed prompts; ``features`` ``[images, tokens, D]`` are in reading order of the rows."""
        embeds = self._embed(batch, features)
        return self.decoder(cache, embeds, batch.attention_mask, batch.vision_index, kept=True)

    def extend(self, cache: Cache, tokens: Ints) -> Step:
        """Feed one more token ``[B]`` to each row."""
        column = tokens[:, None]
        embeds = _only(self.embedding, column)
        nothing = np.zeros((len(tokens), 0), np.int64)
        return self.decoder(cache, embeds, np.ones_like(column), nothing)

    def _embed(self, batch: Batch, features: Array | None) -> Array:
        """``[B, S, D]`` with the image features in their places."""
        is_vision = (batch.input_ids == self.image_token_id) & (batch.attention_mask == 1)
        ids = np.where(is_vision, self.pad_token_id, batch.input_ids)  # it may have no embedding
        embeds = np.array(_only(self.embedding, ids))
        given = 0 if features is None else features.shape[0] * features.shape[1]
        if (places := int(is_vision.sum())) != given:
            raise ArtifactError(
                f"{given} image features for {places} places in the prompt",
                hint="the preprocessor's file belongs to another checkpoint",
            )
        if features is not None:
            embeds[is_vision] = features.reshape(-1, features.shape[-1]).astype(embeds.dtype)
        return embeds


def _only(session: Session, value: Array) -> Array:
    """Run a graph of one input and one output."""
    (name,) = session.inputs
    (result,) = session.run({name: value}).values()
    return np.asarray(result)
