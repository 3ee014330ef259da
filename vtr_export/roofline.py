"""Time by roofline: each part takes as long as its arithmetic or its bytes, whichever is more."""

from collections.abc import Iterable

from vtr_export.cost import cut_flops, decode_rows, get_convention, layer_rows, vision_flops
from vtr_export.devices import Device
from vtr_export.families import ModelFacts
from vtr_export.memory import (
    WeightType,
    Workload,
    head_bytes,
    kv_row_bytes,
    layer_bytes,
    vision_bytes,
)
from vtr_export.schedule import Resolved

Part = tuple[float, float]  # FLOPs, bytes


def seconds(parts: Iterable[Part], device: Device, weights: str) -> float:
    """A lower bound on the time of parts that run one after another."""
    peak = device.flops(weights)
    return sum(max(flops / peak, size / device.bandwidth) for flops, size in parts)


def first_token_parts(
    facts: ModelFacts, resolved: Resolved, work: Workload, kind: WeightType
) -> list[Part]:
    """Vision encoder, decoder layers with their cuts, logits of the last position."""
    count = get_convention("exact").layer
    rows = layer_rows(resolved, work.vision_tokens, work.text_tokens)
    weights, kv = layer_bytes(facts, kind), kv_row_bytes(facts, kind)
    parts: list[Part] = [
        (work.batch * count(facts, row), weights + work.batch * row.new_keys * kv) for row in rows
    ]
    cuts = cut_flops(facts, resolved, work.vision_tokens, work.text_tokens)
    parts += [(work.batch * flops, 0) for flops in cuts]
    parts.append(_head(facts, work, kind))
    if images := work.images * work.batch:
        parts.append((vision_flops(facts, images, resolved), vision_bytes(facts, kind)))
    return parts


def next_token_parts(
    facts: ModelFacts, resolved: Resolved, work: Workload, kind: WeightType
) -> list[Part]:
    """One decode step, halfway through the new tokens."""
    count = get_convention("exact").layer
    rows = decode_rows(resolved, work.vision_tokens, work.text_tokens)
    weights, kv = layer_bytes(facts, kind), kv_row_bytes(facts, kind)
    parts: list[Part] = []
    for row in rows:
        step = row.step(work.new_tokens // 2)
        flops = work.batch * count(facts, step)
        parts.append((flops, weights + work.batch * (step.past + step.new_keys) * kv))
    return [*parts, _head(facts, work, kind)]


def _head(facts: ModelFacts, work: Workload, kind: WeightType) -> Part:
    return (work.batch * 2 * facts.hidden * facts.vocab, head_bytes(facts, kind))
