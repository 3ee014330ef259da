"""Bytes: weights, key-value cache and an estimate of the peak, from facts alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Final

from vtr_export.cost import Rows, decode_rows, layer_rows
from vtr_export.errors import InputError
from vtr_export.families import ModelFacts
from vtr_export.schedule import Resolved


@dataclass(frozen=True)
class WeightType:
    """How weights are held: bytes of a linear layer's element, and of everything else's."""

    name: str
    linear: Fraction
    other: int

    @property
    def compute(self) -> str:
        """What is multiplied: weights of fewer bits are widened, or their products are, to fp16."""
        return self.name if self.linear >= 2 else "fp16"


# Weight-only quantisation of the decoder's linear layers; the vision encoder, the embedding, norms
# and biases stay fp16, and so do activations and cache. int8 has one scale per output channel
# (nothing, here), int4 one fp16 scale per block of 32: 4.5 bits; fp8 one per tensor, fp4 one in fp8
# per block of 16.
WEIGHT_TYPES: Final[Mapping[str, WeightType]] = {
    "fp32": WeightType("fp32", Fraction(4), 4),
    "fp16": WeightType("fp16", Fraction(2), 2),
    "bf16": WeightType("bf16", Fraction(2), 2),
    "int8": WeightType("int8", Fraction(1), 2),
    "int4": WeightType("int4", Fraction(9, 16), 2),
    "fp8": WeightType("fp8", Fraction(1), 2),
    "fp4": WeightType("fp4", Fraction(9, 16), 2),
}


def get_weight_type(name: str) -> WeightType:
    """A way to hold weights by name."""
    if (kind := WEIGHT_TYPES.get(name)) is None:
        raise InputError(f"no weight type {name!r}", hint=f"one of: {', '.join(WEIGHT_TYPES)}")
    return kind


@dataclass(frozen=True)
class Parameters:
    """Counts of what the three exported graphs hold, each weight once."""

    vision: int
    embedding: int  # of tokens, and of positions where they are learned
    layer_linear: int
    layer_other: int
    layers: int
    head: int
    final_norm: int
    crosses: int = 0  # of all cross layers, beyond what they have as layers

    @property
    def total(self) -> int:
        """All parameters."""
        layers = self.layers * (self.layer_linear + self.layer_other) + self.crosses
        return self.vision + self.embedding + layers + self.head + self.final_norm


def parameters(facts: ModelFacts) -> Parameters:
    """Counts from the facts; a tied head is the embedding and counts there."""
    q, kv = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    mlp = (3 if facts.gated else 2) * facts.hidden * facts.intermediate
    tower = facts.vision.parameters if facts.vision else 0
    return Parameters(
        vision=tower + facts.projector_parameters,
        embedding=(facts.vocab + facts.more_embeddings + facts.learned_positions) * facts.hidden,
        layer_linear=2 * facts.hidden * (q + kv) + mlp,
        layer_other=2 * facts.hidden + facts.layer_biases,
        layers=facts.layers,
        head=0 if facts.tied else facts.vocab * facts.hidden,
        final_norm=facts.hidden + facts.norm_biases,
        crosses=facts.cross_parameters,
    )


def layer_bytes(facts: ModelFacts, kind: WeightType) -> int:
    """One decoder layer's weights."""
    count = parameters(facts)
    return int(count.layer_linear * kind.linear) + count.layer_other * kind.other


def vision_bytes(facts: ModelFacts, kind: WeightType) -> int:
    """Vision encoder and projector."""
    return parameters(facts).vision * kind.other


def head_bytes(facts: ModelFacts, kind: WeightType) -> int:
    """What the logits read; a tied head is held as the embedding is."""
    width = Fraction(kind.other) if facts.tied else kind.linear
    return int(facts.vocab * facts.hidden * width)


def weight_bytes(facts: ModelFacts, kind: WeightType) -> int:
    """All weights of the artifact."""
    count = parameters(facts)
    head = 0 if facts.tied else head_bytes(facts, kind)
    rest = (count.embedding + count.final_norm) * kind.other + int(count.crosses * kind.linear)
    return vision_bytes(facts, kind) + rest + facts.layers * layer_bytes(facts, kind) + head


def kv_row_bytes(facts: ModelFacts, kind: WeightType) -> int:
    """Key and value of one token in one layer."""
    widths = facts.head_dim + (facts.value_dim or facts.head_dim)
    return facts.kv_heads * widths * kind.other


@dataclass(frozen=True)
class Workload:
    """One batch: every row the same number of vision and text tokens, then new tokens."""

    vision_tokens: int
    text_tokens: int
    images: int = 1
    batch: int = 1
    new_tokens: int = 0


def kv_bytes(
    facts: ModelFacts, resolved: Resolved, work: Workload, kind: WeightType, new_tokens: int
) -> int:
    """The cache after ``new_tokens`` steps; every stage has its own length, unless compacted."""
    rows = decode_rows(resolved, work.vision_tokens, work.text_tokens)
    tokens = sum(row.new_keys + new_tokens * (row.keys is None) for row in rows)
    return work.batch * tokens * kv_row_bytes(facts, kind)


@dataclass(frozen=True)
class Peak:
    """Bytes held at the worst moment: weights always, one of the three phases at a time.

    An estimate: the runtime's own arena, code and alignment come on top.
    """

    weights: int
    vision: int
    prefill: int
    decode: int

    @property
    def total(self) -> int:
        """The worst moment."""
        return self.weights + max(self.vision, self.prefill, self.decode)

    @property
    def dominant(self) -> str:
        """The name of the largest part."""
        parts = {"weights": self.weights, "vision encoder": self.vision}
        parts |= {"prefill": self.prefill, "decode (cache in and out)": self.decode}
        return max(parts, key=lambda name: parts[name])


def peak_bytes(
    facts: ModelFacts, resolved: Resolved, work: Workload, kind: WeightType, fused: bool
) -> Peak:
    """An estimate of the peak; ``fused`` attention never holds n x n scores.

    Decode holds the cache twice: past goes in, present comes out. So does a compaction, of the
    cache that the prefill left.
    """
    whole, left = (
        kv_bytes(facts, r, work, kind, 0) for r in (replace(resolved, decode=()), resolved)
    )
    rows = layer_rows(resolved, work.vision_tokens, work.text_tokens)
    cuts = {cut.before_layer - 1 for cut in resolved.cuts if resolved.asks_all}
    widest = max(
        _layer_activations(facts, row, kind, fused)
        + _block_bytes(facts, row, work.text_tokens) * (layer in cuts)
        for layer, row in enumerate(rows)
    )
    embeddings = rows[0].entering * facts.hidden * kind.other
    return Peak(
        weights=weight_bytes(facts, kind),
        vision=_vision_activations(facts, work, kind, fused),
        prefill=work.batch * (widest + embeddings + 4 * facts.vocab) + whole,
        decode=max(whole + left, 2 * kv_bytes(facts, resolved, work, kind, work.new_tokens)),
    )


def _block_bytes(facts: ModelFacts, rows: Rows, text_tokens: int) -> int:
    """What all vision rows and text give all keys, in fp32: logits, and what softmax makes."""
    vision = max(0, rows.entering - text_tokens)
    return 2 * 4 * facts.heads * (vision + text_tokens) * rows.entering * bool(vision)


def _layer_activations(facts: ModelFacts, rows: Rows, kind: WeightType, fused: bool) -> int:
    """The larger of attention and MLP: residual, norm, and what is in flight beside them."""
    n, q = rows.entering, facts.heads * facts.head_dim
    scores = n * rows.new_keys * (1 + (0 if fused else 4 * facts.heads))  # bool mask; fp32 scores
    attention = n * (2 * facts.hidden + 2 * q) * kind.other + scores
    mlp = rows.leaving * (2 * facts.hidden + 2 * facts.intermediate) * kind.other
    return max(attention, mlp)


def _tiles(facts: ModelFacts, work: Workload) -> int:
    """What a row's images are to the tower: so many, or their tiles."""
    vision = facts.vision
    size = vision.image_size if vision else None
    if facts.anyres is None or size is None:
        if facts.tokens_per_image is not None or vision is None or vision.tokens is None:
            return work.images
        tokens = (vision.tokens - vision.has_cls) // vision.merge**2  # of a tile
        return max(work.images, -(-work.vision_tokens // tokens))
    return work.images * facts.anyres.most_tiles(size)


def _vision_activations(facts: ModelFacts, work: Workload, kind: WeightType, fused: bool) -> int:
    vision = facts.vision
    if vision is None:
        return 0
    images = _tiles(facts, work) * work.batch
    n = vision.tokens or -(-work.vision_tokens * vision.merge**2 // max(1, work.images))
    area = vision.image_size**2 if vision.image_size else n * vision.patch_size**2
    pixels = vision.channels * area * kind.other
    scores = 0 if fused else 4 * vision.heads * n * n
    attention = 5 * n * vision.hidden * kind.other + scores
    mlp = n * (2 * vision.hidden + vision.intermediate) * kind.other
    return images * (pixels + max(attention, mlp))


_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS_BINARY: Final = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """``8GiB``, ``500MB`` or a plain number of bytes."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kmgt]i?)?b?", text.strip().lower())
    if match is None or not Fraction(match[1]):
        raise InputError(f"{text[:40]!r} is not an amount of memory", hint="8GiB, 500MB or bytes")
    return int(Fraction(match[1]) * (_UNITS | _UNITS_BINARY)[match[2] or ""])
