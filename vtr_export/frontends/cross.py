"""Decoders whose layers attend to image features through cross-attention: what is traced.

Keys of images (*vision keys*) are no tokens: text never moves, and a cut narrows the keys. The
graph has these inputs beside those of every decoder (``vision_index`` and ``token_groups`` it has
not):

- ``cross_states`` [B,V,D]: projected features of this call's images; V is 0 in decode steps and
  without images. A row with fewer begins with zeros.
- ``cross_mask`` [B,S,V] bool: which of them a token sees.
- ``cross_rows`` [B,S] int64, where a family asks: rows that the rest of a cross layer counts in
  (Mllama: its MLP is silent in rows that see no image).
- ``past_key_values.N.key|value`` [B,kv_heads,P,d] of a cross layer N: vision keys of earlier calls.
  The cache begins with one key of zeros (P = 1, dimension ``cross_past``), which only those rows
  see that see no other: what they add is nothing, and no attention is ever over no key at all.
- ``past_mask.cross`` [B,P] int64: which of those keys later rows see; ``present_mask.cross`` goes
  on from it. Behind cut J they are ``past_mask.J`` and ``present_mask.J``.

A cross layer is ``Attention(query, Concat(past, project(cross_states)), …, mask)`` with
``mask = vtr.VtrCrossMask(past_mask, cross_mask)``; the analysis labels the axis of vision keys
(``Axes.vision``, with the past ``Axes.vision_key``) beside that of tokens. ``kept.J`` [B,k] are
columns of ``cross_states`` of the stage before cut J. It is scored by the last row in the last
cross layer before it, and later cross layers project what is left.

``ModelFacts.crosses`` names the layers. A family is a function here: its decoder's own forward,
given a ``Crossing`` of stand-ins, which ``passes/attach_cross.py`` replaces.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import Module
from transformers import DynamicCache, PreTrainedModel

from vtr_export.families import ModelFacts
from vtr_export.frontends.concrete import Concrete
from vtr_export.frontends.families import idefics, mllama
from vtr_export.frontends.shaped import Shaped
from vtr_export.frontends.trace import trace
from vtr_export.passes.attach_cross import AttachCross

CALLS: Final = ("batch", "sequence", "past", "vision", "cross_past")


@dataclass(frozen=True)
class Crossing:
    """What the cross layers of a call read: ``states`` [B,V,D], and stand-ins for two masks.

    ``mask`` [1,1,1,1] is of their attention; ``rows`` [B,S,1] multiplies what it may silence.
    """

    states: Tensor
    mask: Tensor
    rows: Tensor


Forward: TypeAlias = Callable[[Any, Mapping[str, Any], Crossing], Tensor]
FORWARDS: Final[Mapping[str, Forward]] = {
    "idefics": idefics.decoded,
    "mllama": mllama.decoded,
}
"""By model type: (model, what a text decoder is called with, crossing) → logits [B,1,vocab]."""


class CrossDecoder(Module):
    """One call of a decoder with cross-attention: the last position's logits, and the cache."""

    def __init__(self, model: PreTrainedModel, forward: Forward) -> None:
        super().__init__()
        self.model, self.decode = model, forward

    def forward(
        self,
        inputs_embeds: Tensor,
        mask: Tensor,
        position_ids: Tensor,
        cross_states: Tensor,
        cross: Tensor,
        rows: Tensor,
        past: list[list[Tensor]],
    ) -> list[Tensor]:
        """Logits [B,1,vocab] in fp32, then key and value of every layer."""
        cache = DynamicCache([(key, value) for key, value in past])
        asked = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": mask,
            "position_ids": position_ids,
            "past_key_values": cache,
            "use_cache": True,
        }
        with Concrete(), Shaped():
            logits = self.decode(self.model, asked, Crossing(cross_states, cross, rows))
        layers = cache.layers
        return [logits.float(), *(part for layer in layers for part in (layer.keys, layer.values))]


def trace_decoder(model: PreTrainedModel, facts: ModelFacts, dtype: torch.dtype) -> ir.Model:
    """The decoder of a family with ``facts.crosses``; its masks are attached."""
    batch, sequence, past, vision, cross_past = dims = tuple(map(Dim, CALLS))
    sizes = dict(zip(dims, (2, 3, 5, 7, 4), strict=True))
    numbers = range(facts.layers)
    pasts = [cross_past if number in facts.crosses else past for number in numbers]
    shapes = [(sizes[batch], facts.kv_heads, sizes[each], facts.head_dim) for each in pasts]
    names = [f"{number}.{part}" for number in numbers for part in ("key", "value")]
    rows, width = (sizes[batch], sizes[sequence]), facts.cross_width or facts.hidden
    decoder = trace(
        CrossDecoder(model, FORWARDS[facts.model_type]),
        (
            torch.empty(*rows, facts.hidden, dtype=dtype),
            torch.ones(1, 1, 1, 1, dtype=torch.bool),
            torch.zeros(rows, dtype=torch.long),
            torch.empty(sizes[batch], sizes[vision], width, dtype=dtype),
            torch.ones(1, 1, 1, 1, dtype=torch.bool),
            torch.ones(*rows, 1, dtype=dtype),
            [[torch.empty(shape, dtype=dtype) for _ in range(2)] for shape in shapes],
        ),
        (
            {0: batch, 1: sequence},
            None,
            {0: batch, 1: sequence},
            {0: batch, 1: vision},
            None,
            {0: batch, 1: sequence},
            [[{0: batch, 2: each} for _ in range(2)] for each in pasts],
        ),
        inputs=[
            *("inputs_embeds", "mask", "position_ids", "cross_states", "cross", "rows"),
            *(f"past_key_values.{name}" for name in names),
        ],
        outputs=["logits", *(f"present.{name}" for name in names)],
        dimensions=_dimensions(facts),
    )
    AttachCross()(decoder)
    return decoder


def _dimensions(facts: ModelFacts) -> dict[str, tuple[str, int]]:
    crossing = facts.crosses[0]
    own = next(number for number in range(facts.layers) if number not in facts.crosses)
    return {
        "batch": ("inputs_embeds", 0),
        "sequence": ("inputs_embeds", 1),
        "vision": ("cross_states", 1),
        "past": (f"past_key_values.{own}.key", 2),
        "total": (f"present.{own}.key", 2),
        "cross_past": (f"past_key_values.{crossing}.key", 2),
        "cross_total": (f"present.{crossing}.key", 2),
    }
