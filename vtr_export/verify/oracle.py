"""The checkpoint itself, loaded by transformers, answers through the reference decoder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtr_export.reference import (
    Head,
    Reference,
    crossing_for,
    embed,
    groups_for,
    image_features,
    load_model,
    pad_batch,
    positions_for,
    reduced_features,
    vision_index_of,
)
from vtr_export.schedule import Resolved
from vtr_export.verify.case import Array, Case, Question, Trace, noted, sampled
from vtr_export.verify.gates import differing

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Oracle:
    """The model of ``weights`` (a checkpoint folder) as ``config`` (a folder) describes it."""

    def __init__(
        self, weights: Path, config: Path, schedule: Resolved, dtype: str, *, trusted: bool = False
    ) -> None:
        torch.manual_seed(0)
        eager = {"attn_implementation": "eager"}
        self._model: Any = load_model(weights, config, DTYPES[dtype], trusted=trusted, **eager)
        self._dtype, self._schedule = DTYPES[dtype], schedule
        self._decoder, self._crosses = self._model.get_decoder(), bool(schedule.crosses)
        self._reference = Reference(self._decoder, Head(self._model), schedule)
        self.protected: dict[str, Array] = {}  # [tokens] bool by question: what the tower protects

    @torch.no_grad()
    def answer(self, question: Question, steps: int) -> Case:
        """Prefill and ``steps`` greedy decode steps, which end tokens do not stop.

        Where the vision part of a schedule chooses, the decoder is asked about the tokens that the
        graph chose (``question.features``): what the checkpoint would choose is compared apart.
        """
        ids, mask = torch.tensor(question.input_ids), torch.tensor(question.attention_mask)
        crossing = crossing_for(self._model, ids, mask, question.given) if self._crosses else None
        given = None if self._crosses else question.given
        features = self._features(question)
        chosen = None if question.features is None else torch.tensor(question.features)
        embeds, index = embed(self._model, ids, mask, given, chosen)
        index = index[:, :0] if self._crosses else index
        positions = positions_for(self._model, ids, mask, question.given)
        groups = groups_for(self._model, ids, mask)
        marks = None if question.protected is None else torch.tensor(question.protected)
        more: dict[str, Any] = {"groups": groups, "crossing": crossing, "protected": marks}
        with self._streams() as streams:
            said = self._reference.generate(
                self._model.get_input_embeddings(),
                embeds,
                mask,
                index,
                max_new_tokens=steps + 1,
                positions=positions,
                **more,
            )
        nothing = torch.full_like(embeds, torch.nan)
        silent = self._reference(nothing, mask, positions[0], index, **more)
        logits, logit_ids = noted(_numpy(said.logits))
        prefill = said.prefill
        return Case(
            question=question,
            tokens=_numpy(said.tokens[:, :steps]),
            logits=logits,
            logit_ids=logit_ids,
            features=sampled(_numpy(features), rows=question.features is not None),
            kept=_arrays(prefill.kept),
            kept_vision=_arrays(prefill.kept_vision),
            scores=_arrays(prefill.scores),
            labels=_arrays(prefill.labels),
            margins=_arrays(prefill.margins),
            ties=_arrays(silent.kept),
            by_threshold=self._schedule.threshold is not None,
            trace=Trace(self._text_embeds(ids), np.stack(streams)),
        )

    def _features(self, question: Question) -> Tensor:
        """``[tokens, D]`` of all images, reduced as the schedule says."""
        schedule = self._schedule
        if schedule.tower is None:
            return image_features(self._model, question.given)
        given = {name: torch.as_tensor(values) for name, values in question.given.items()}
        encode = partial(image_features, self._model)
        left = reduced_features(self._model, given, schedule.vision, schedule.tower, encode)
        flags = [each.protected for each in left if each.protected is not None]
        if flags:
            self.protected[question.name] = torch.cat(flags).numpy()
        return torch.cat([each.features for each in left])

    def differing_inputs(
        self, question: Question, rows: Sequence[Sequence[int]], pad: int, image: int
    ) -> int:
        """Entries in which the runtime's batch is not the reference's."""
        image = -1 if self._crosses else image
        ids, mask = pad_batch(rows, pad, image)
        positions, ahead = positions_for(self._model, ids, mask, question.given)
        following = mask.sum(1) + ahead
        index, groups = vision_index_of(ids == image, mask), groups_for(self._model, ids, mask)
        theirs = [ids, mask, positions, following, index, groups]
        ours: list[Array] = [
            question.input_ids,
            question.attention_mask,
            question.position_ids,
            question.following,
            question.vision_index,
            question.groups,
        ]
        if self._crosses:
            crossing = crossing_for(self._model, ids, mask, question.given)
            theirs += [crossing.features, crossing.seen, crossing.rows.long()]
            ours += question.crossing.values()
        return int(
            sum(differing(mine, other.numpy()) for mine, other in zip(ours, theirs, strict=True))
        )

    def _text_embeds(self, ids: Tensor) -> Array:
        embeds = self._model.get_input_embeddings()(ids).clone()
        if not self._crosses:
            embeds[ids == self._model.config.image_token_id] = 0
        return _numpy(embeds)

    @contextmanager
    def _streams(self) -> Iterator[list[Array]]:
        """``[layers + 1, B, D]`` a call: the last row into each layer, and the final norm."""
        places = [*self._decoder.layers, self._decoder.norm]
        rows: dict[int, Array] = {}
        calls: list[Array] = []

        def watch(number: int) -> Any:
            def note(_: object, args: tuple[Tensor, ...]) -> None:
                rows[number] = _numpy(args[0][:, -1].clone())
                if number == len(places) - 1:  # the final norm ends a call
                    calls.append(np.stack([rows[i] for i in range(len(places))]))

            return note

        handles = [place.register_forward_pre_hook(watch(i)) for i, place in enumerate(places)]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()


def _numpy(tensor: Tensor) -> Array:
    """Floats as fp32."""
    array: Array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


def _arrays(tensors: Sequence[Tensor]) -> tuple[Array, ...]:
    return tuple(_numpy(tensor) for tensor in tensors)
