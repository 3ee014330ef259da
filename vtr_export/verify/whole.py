"""Models whose images are no tokens answer by their own forward; nothing of them is cut."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vtr_export.reference import pad_batch, positions_of, vision_index_of
from vtr_export.verify.case import Array, Case, Question, Trace, noted, sampled
from vtr_export.verify.gates import differing
from vtr_export.verify.oracle import Oracle


class WholeOracle(Oracle):
    """``models/`` says what a model is; its ``beside`` is what every call of it is given alike."""

    @torch.no_grad()
    def answer(self, question: Question, steps: int) -> Case:
        """Prefill and ``steps`` greedy decode steps, which end tokens do not stop."""
        ids, mask = torch.tensor(question.input_ids), torch.tensor(question.attention_mask)
        pixels = torch.as_tensor(question.given["pixel_values"]).to(self._dtype)
        features, beside = self._model.beside(pixels, ids, mask)
        with self._streams() as streams:
            logits, tokens = self._said(ids, mask, beside, steps)
        best, logit_ids = noted(_floats(logits))
        text = _floats(self._model.get_input_embeddings()(ids))
        return Case(
            question=question,
            tokens=tokens.numpy(),
            logits=best,
            logit_ids=logit_ids,
            features=sampled(_floats(features)),
            kept=(),
            kept_vision=(),
            scores=(),
            margins=(),
            ties=(),
            trace=Trace(text, np.stack(streams)),
        )

    def _said(
        self, ids: Tensor, mask: Tensor, beside: dict[str, Tensor], steps: int
    ) -> tuple[Tensor, Tensor]:
        """Logits ``[B, 1 + steps, vocab]`` fp32, and the tokens ``[B, steps]`` between them."""
        logits, tokens = list[Tensor](), list[Tensor]()
        cache: Any = None
        for _ in range(steps + 1):
            said = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions_of(mask)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                **beside,
            )
            cache, ids = said.past_key_values, said.logits[:, -1:].argmax(-1)
            mask = functional.pad(mask, (0, 1), value=1)
            logits.append(said.logits[:, -1:].float())
            tokens.append(ids)
        return torch.cat(logits, 1), torch.cat(tokens[:-1], 1)

    def differing_inputs(
        self, question: Question, rows: Sequence[Sequence[int]], pad: int, image: int
    ) -> int:
        """Entries in which the runtime's batch is not the reference's."""
        ids, mask = pad_batch(rows, pad, image)
        theirs = ids, mask, positions_of(mask), mask.sum(1), vision_index_of(ids == image, mask)
        ours = (
            question.input_ids,
            question.attention_mask,
            question.position_ids,
            question.following,
            question.vision_index,
        )
        return int(
            sum(differing(mine, other.numpy()) for mine, other in zip(ours, theirs, strict=True))
        )


def _floats(tensor: Tensor) -> Array:
    """As fp32."""
    array: Array = tensor.float().numpy()
    return array
