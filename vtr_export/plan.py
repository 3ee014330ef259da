"""What would happen: tokens, cost, bytes and time of a schedule on a model, from facts alone."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vtr_export.cost import (
    decode_cost,
    get_convention,
    ideal_speedup,
    prefill_cost,
    vision_flops,
    without_cuts,
)
from vtr_export.devices import get_device
from vtr_export.errors import InputError
from vtr_export.families import ModelFacts
from vtr_export.memory import (
    Peak,
    WeightType,
    Workload,
    get_weight_type,
    kv_bytes,
    parse_bytes,
    peak_bytes,
    weight_bytes,
)
from vtr_export.process import size
from vtr_export.roofline import first_token_parts, next_token_parts, seconds
from vtr_export.schedule import Resolved, Schedule
from vtr_export.target_fit import check_fits_target
from vtr_export.targets import check_target, fuses_attention, target_notes
from vtr_export.tensorrt_10 import verdict


@dataclass(frozen=True)
class PlanReport:
    """A prediction. Names ending in ``_unpruned`` are the same model without cuts.

    ``total`` and ``unpruned`` are the decoder's prefill of one prompt in the convention's unit,
    ``decode`` its ``new_tokens`` steps after it, ``answer_ratio`` that of both together; bytes and
    times are the whole batch's. ``ttft_ms`` (time to first token, vision encoder included) and
    ``tpot_ms`` (time per output token) are lower bounds by roofline. ``limits`` are what the target
    cannot do and our plugin can; ``parses``, with tensorrt-10, is whether a lowered decoder would
    parse there.
    """

    model_type: str
    convention: str
    unit: str
    formula: str
    text_tokens: int
    vision_tokens: int
    images: int
    batch: int
    new_tokens: int
    weights: str
    vision_tokens_per_layer: tuple[int, ...]
    total: int
    unpruned: int
    ratio: float
    decode: int
    decode_unpruned: int
    answer_ratio: float
    ideal_speedup: float
    vision_flops: int
    vision_flops_unpruned: int
    weight_bytes: int
    kv_bytes: int
    kv_bytes_unpruned: int
    peak_bytes: int
    peak_bytes_unpruned: int
    dominant: str
    memory_bytes: int | None
    fits: bool | None
    fits_unpruned: bool | None
    device: str | None
    ttft_ms: float | None
    ttft_ms_unpruned: float | None
    tpot_ms: float | None
    tpot_ms_unpruned: float | None
    target: str
    sms: tuple[int, ...]
    dtype: str
    plugin: str
    limits: tuple[str, ...]
    parses: str | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        values = asdict(self)
        lists = {name: list(v) for name, v in values.items() if isinstance(v, tuple)}
        return values | lists

    def rows(self) -> list[tuple[str, str, str]]:
        """Lines of (what, unpruned, pruned)."""
        whole = self.vision_tokens * len(self.vision_tokens_per_layer)
        lines = [
            ("vision tokens, over layers", f"{whole:,}", f"{sum(self.vision_tokens_per_layer):,}"),
            *self._vision_rows(),
            *self._cost_rows(),
            ("weights", size(self.weight_bytes), size(self.weight_bytes)),
            ("KV cache", size(self.kv_bytes_unpruned), size(self.kv_bytes)),
            ("peak memory", size(self.peak_bytes_unpruned), size(self.peak_bytes)),
        ]
        if self.memory_bytes is not None:
            label = f"fits {size(self.memory_bytes)}"
            lines.append((label, _yes(self.fits_unpruned), _yes(self.fits)))
        if self.device is not None:
            times = f"{self.ttft_ms_unpruned:.1f} ms", f"{self.ttft_ms:.1f} ms"
            lines.append((f"first token, {self.device}", *times))
            times = f"{self.tpot_ms_unpruned:.2f} ms", f"{self.tpot_ms:.2f} ms"
            lines.append((f"each next token, {self.device}", *times))
        return lines

    def _vision_rows(self) -> list[tuple[str, str, str]]:
        """The encoder, where reductions change what it computes."""
        whole, reduced = self.vision_flops_unpruned, self.vision_flops
        if whole == reduced:
            return []
        return [("vision encoder, FLOPs", f"{whole:.4g}", f"{reduced:.4g}")]

    def _cost_rows(self) -> list[tuple[str, str, str]]:
        """Prefill and, where tokens are decoded, decode and the sum."""
        costs = [("prefill", self.unpruned, self.total)]
        if self.new_tokens:
            both = self.unpruned + self.decode_unpruned, self.total + self.decode
            costs.append((f"decode of {self.new_tokens}", self.decode_unpruned, self.decode))
            costs.append(("prefill and decode", *both))
        return [
            (f"{part}, {self.convention}", f"{whole:.4g}", f"{pruned:.4g}")
            for part, whole, pruned in costs
        ]


def plan(
    schedule: Schedule,
    facts: ModelFacts,
    *,
    convention: str = "F-A",
    text_tokens: int = 64,
    images: int = 1,
    batch: int = 1,
    new_tokens: int = 128,
    vision_tokens: int | None = None,
    device: str | None = None,
    weights: str = "fp16",
    memory: str | int | None = None,
    target: str = "onnxruntime",
    sms: tuple[int, ...] = (),
    dtype: str | None = None,
    plugin: str = "auto",
) -> PlanReport:
    """Predict a schedule on a model.

    ``vision_tokens`` (per prompt) is needed only where the tokens of an image vary; ``dtype`` is
    what the decoder computes in (by default as ``weights`` say). Raises ScheduleError for a
    schedule that does not fit model or target, InputError for an option.
    """
    kind = get_weight_type(weights)
    dtype = dtype or kind.compute
    for used in dict.fromkeys((dtype, weights)):
        check_target(target, sms, used)
    resolved = schedule.resolve(facts)
    counts = {"text_tokens": text_tokens, "images": images, "new_tokens": new_tokens}
    for name, value in counts.items():
        _check_count(name, value, 0)
    _check_count("batch", batch, 1)
    v = _vision_tokens(facts, images, vision_tokens)
    work = Workload(v, text_tokens, images, batch, new_tokens)
    limits = check_fits_target(
        schedule,
        resolved,
        resolved.entering(v),
        target,
        sms=sms,
        sandwiched=facts.sandwiched,
        plugin=plugin,
    )
    return PlanReport(
        model_type=facts.model_type,
        weights=weights,
        target=target,
        sms=sms,
        dtype=dtype,
        plugin=plugin,
        limits=limits,
        parses=verdict(resolved) if target == "tensorrt-10" else None,
        notes=(*_bounds(resolved), *_notes(facts, work, target, sms)),
        **asdict(work),
        **_cost(facts, resolved, work, convention),
        **_memory(facts, resolved, work, kind, _holds_scores(facts, device, target), memory),
        **_times(facts, resolved, work, kind, device),
    )


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}", hint=f"give an integer from {least} on")


def _vision_tokens(facts: ModelFacts, images: int, vision_tokens: int | None) -> int:
    if vision_tokens is not None:
        _check_count("vision_tokens", vision_tokens, 0)
        return vision_tokens
    if facts.tokens_per_image is None:
        raise InputError(
            "the tokens of an image vary with this model", hint="say how many: vision_tokens"
        )
    return images * facts.tokens_per_image


def _cost(facts: ModelFacts, resolved: Resolved, work: Workload, convention: str) -> dict[str, Any]:
    """Prefill and decode of one prompt, in the convention's unit."""
    rule, v, text = get_convention(convention), work.vision_tokens, work.text_tokens
    both = resolved, without_cuts(resolved)
    total, unpruned = (prefill_cost(facts, r, v, text, convention) for r in both)
    decode, decode_unpruned = (
        decode_cost(facts, r, v, text, work.new_tokens, convention) for r in both
    )
    answer = unpruned + decode_unpruned
    return {
        "convention": rule.name,
        "unit": rule.unit,
        "formula": rule.formula,
        "vision_tokens_per_layer": resolved.keep_per_layer(resolved.entering(v)),
        "total": total,
        "unpruned": unpruned,
        "ratio": total / unpruned if unpruned else 1.0,
        "decode": decode,
        "decode_unpruned": decode_unpruned,
        "answer_ratio": (total + decode) / answer if answer else 1.0,
        "ideal_speedup": ideal_speedup(facts, resolved, v, text),
        "vision_flops": vision_flops(facts, work.images, resolved),
        "vision_flops_unpruned": vision_flops(facts, work.images),
    }


def _bounds(resolved: Resolved) -> Iterator[str]:
    """What of the numbers is a bound, because the image decides."""
    if not resolved.is_static or resolved.threshold is not None:
        yield "how many tokens are left depends on the image: all numbers are upper bounds"


def _notes(facts: ModelFacts, work: Workload, target: str, sms: tuple[int, ...]) -> tuple[str, ...]:
    notes = [*facts.remarks]
    length = work.vision_tokens + work.text_tokens + work.new_tokens
    if length > facts.context:
        notes.append(f"{length} positions, but the model was trained for {facts.context}")
    if target in ("tensorrt", "tensorrt-rtx") and not fuses_attention(target, facts.head_dim):
        notes.append(f"no fused attention for heads of {facts.head_dim}: n x n scores are held")
    return (*notes, *target_notes(target, sms))


def _holds_scores(facts: ModelFacts, device: str | None, target: str) -> bool:
    """Whether attention holds n x n scores: on ONNX Runtime's CPU, and where nothing fuses it."""
    if target.startswith("tensorrt"):
        return not fuses_attention(target, facts.head_dim)
    return device is None or not get_device(device).fused_attention


def _memory(
    facts: ModelFacts,
    resolved: Resolved,
    work: Workload,
    kind: WeightType,
    scores: bool,
    memory: str | int | None,
) -> dict[str, Any]:
    """Bytes held, with or without the scores of an unfused attention, and whether they fit."""
    limit = parse_bytes(memory) if isinstance(memory, str) else memory
    pruned, whole = (
        peak_bytes(facts, r, work, kind, not scores) for r in (resolved, without_cuts(resolved))
    )

    def fits(peak: Peak) -> bool | None:
        return None if limit is None else peak.total <= limit

    return {
        "weight_bytes": weight_bytes(facts, kind),
        "kv_bytes": kv_bytes(facts, resolved, work, kind, work.new_tokens),
        "kv_bytes_unpruned": kv_bytes(facts, without_cuts(resolved), work, kind, work.new_tokens),
        "peak_bytes": pruned.total,
        "peak_bytes_unpruned": whole.total,
        "dominant": pruned.dominant,
        "memory_bytes": limit,
        "fits": fits(pruned),
        "fits_unpruned": fits(whole),
    }


def _times(
    facts: ModelFacts, resolved: Resolved, work: Workload, kind: WeightType, device: str | None
) -> dict[str, Any]:
    """Milliseconds on a device; None without one."""
    names = ("ttft_ms", "ttft_ms_unpruned", "tpot_ms", "tpot_ms_unpruned")
    if device is None:
        return {"device": None, **dict.fromkeys(names)}
    machine, both = get_device(device), (resolved, without_cuts(resolved))
    times = [
        1e3 * seconds(parts(facts, r, work, kind), machine, kind.name)
        for parts in (first_token_parts, next_token_parts)
        for r in both
    ]
    return {"device": device, **dict(zip(names, times, strict=True))}


def _yes(value: bool | None) -> str:
    return "yes" if value else "no"
