"""What a target can build of a schedule: asked before any weight is read."""

from collections.abc import Iterator

from vtr_export.errors import InputError, ScheduleError
from vtr_export.schedule import Resolved, Schedule
from vtr_export.schedule_document import Recycle
from vtr_export.targets import PLUGINS, SANDWICHED, TOP_K, TURING, check_name


def check_fits_target(
    schedule: Schedule,
    resolved: Resolved,
    vision_tokens: int,
    target: str,
    *,
    sms: tuple[int, ...] = (),
    sandwiched: bool = False,
    plugin: str = "off",
) -> tuple[str, ...]:
    """Refuse what ``target`` cannot build; what it can build with our plugin only is returned.

    The lengths of an engine follow from those of its inputs: no image may decide by what it shows.
    TensorRT's TopK selects at most 3840: of a call, or with ``rank: per_image`` of an image.
    TensorRT-RTX multiplies no fp32 matrices for Turing, and a cut's scores are such a product; and
    it fails to compile a cut's own layers ahead of ``sandwiched`` ones (its 1.7.1).
    ``plugin`` is auto, on or off.
    """
    check_name(target)
    _check_plugin(target, plugin, resolved)
    if not target.startswith("tensorrt"):
        return ()
    _check_static(schedule, resolved, target)
    limits = [*_too_many(resolved, vision_tokens, target), *_unscored(resolved, target, sms)]
    limits += _uncompiled(resolved, target, sandwiched)
    way_out = _way_to_plugin(target, plugin, resolved)
    for before_layer, limit, hint in limits:
        if way_out is not None:
            raise ScheduleError(
                limit,
                where=schedule.place_of(before_layer),
                hint=f"{hint}{way_out}, or target onnxruntime",
            )
    return tuple(f"{limit}: needs the plugin" for _, limit, _ in limits)


def _check_static(schedule: Schedule, resolved: Resolved, target: str) -> None:
    """ScheduleError for the first thing that leaves as many tokens as an image's content says."""
    decides = f"lets what an image shows decide how many tokens are left; {target} builds no such"
    for number, reduction in enumerate(resolved.vision):
        if reduction.form != "static":
            raise ScheduleError(
                f"{reduction.method} {decides} graph",
                where=schedule.source.at(("vision", number)),
                hint=f"{reduction.STATIC_FORM or 'another method'}, or target onnxruntime",
            )
    if resolved.threshold is not None:
        raise ScheduleError(
            f"a threshold {decides} cut",
            where=schedule.source.at(("prefill", "threshold")),
            hint="leave threshold out: keep says how many; or target onnxruntime",
        )


def _check_plugin(target: str, plugin: str, resolved: Resolved) -> None:
    """InputError for what is no choice, and for a plugin that would have to serve and cannot."""
    if plugin not in PLUGINS:
        raise InputError(f"no plugin choice {plugin!r}", hint=f"one of: {', '.join(PLUGINS)}")
    if plugin == "on" and target in ("onnxruntime", "tensorrt-10"):
        raise InputError(
            f"{target} takes no plugin of ours",
            where="--plugin on",
            hint="leave it out: the operators' own bodies run there",
        )
    if plugin == "on" and resolved.cuts and not resolved.is_fusible:
        raise InputError(
            "the plugin drops what attention ranks last, and this schedule's cuts do more",
            where="--plugin on",
            hint="--plugin auto: the cuts become TensorRT's own layers",
        )


def _way_to_plugin(target: str, plugin: str, resolved: Resolved) -> str | None:
    """None where the plugin serves; else what of the plugin is a way out, for the end of a hint."""
    if target == "tensorrt-10" or not resolved.is_fusible:
        return ""
    return ", --plugin auto" if plugin == "off" else None


def _too_many(
    resolved: Resolved, vision_tokens: int, target: str
) -> Iterator[tuple[int, str, str]]:
    """Cuts beyond TopK: (layer, limit, way out). Engines leave out a cut that keeps everything."""
    entering = (vision_tokens, *resolved.behind_cuts(vision_tokens))
    for cut, before in zip(resolved.cuts, entering, strict=False):
        kept = cut.keep.of(vision_tokens)
        if kept == vision_tokens and target != "tensorrt-10":
            continue
        selected = cut.keep.numerator if resolved.rank == "per_image" else kept
        if isinstance(resolved.merge, Recycle):
            selected = max(selected, resolved.merge.of(before - kept)[0])
        if selected > TOP_K:
            limit = f"{selected} tokens kept before layer {cut.before_layer}"
            limit += f", but TensorRT selects at most {TOP_K}"
            yield cut.before_layer, limit, f"keep at most {TOP_K}, fewer images a call"


def _unscored(
    resolved: Resolved, target: str, sms: tuple[int, ...]
) -> Iterator[tuple[int, str, str]]:
    """The first cut, where its scores cannot be multiplied: (layer, limit, way out)."""
    if resolved.cuts and target == "tensorrt-rtx" and TURING in sms:
        limit = "a cut's scores are an fp32 product, and TensorRT-RTX has none for SM 7.5 (Turing)"
        yield resolved.cuts[0].before_layer, limit, "leave SM 7.5 out"


def _uncompiled(
    resolved: Resolved, target: str, sandwiched: bool
) -> Iterator[tuple[int, str, str]]:
    """The first cut, where TensorRT-RTX fails on what follows: (layer, limit, way out)."""
    if resolved.cuts and target == "tensorrt-rtx" and sandwiched:
        yield resolved.cuts[0].before_layer, SANDWICHED, "cut nothing"
