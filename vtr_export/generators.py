"""Methods of the literature as schedules: each function writes the data of one document."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Final

from vtr_export.errors import ScheduleError
from vtr_export.schedule_document import MAX_PART, read_share, write_keep

Data = dict[str, Any]
Ratio = float | str | Fraction


def exact(value: Ratio, name: str, where: str) -> Fraction:
    """``0.5``, ``"50%"``, ``"1/3"`` or a Fraction, between 0 and 1; a float means its decimals."""
    share: Fraction | None
    try:
        share = read_share(value) if isinstance(value, str) else None
        share = Fraction(str(value)) if share is None else share
    except (ValueError, ZeroDivisionError):
        share = None
    if share is None or isinstance(value, bool) or not 0 <= share <= 1:
        raise ScheduleError(f"{name} is {value!r}", where=where, hint="give 0.5, '50%' or '1/3'")
    if share.denominator > MAX_PART:
        raise ScheduleError(
            f"{name} is {value!r}, too fine to be meant",
            where=where,
            hint="write it as a fraction, '1/3'",
        )
    return share


def fastv(k: int, r: Ratio, tokens: int | None) -> Data:
    """FastV: drop the share ``r`` before layer ``k``, by the last token's mean attention in k-1.

    The method keeps round(N(1-R)); with ``tokens`` = N that integer is written, without it the
    exact share, rounded down.
    """
    where = "Schedule.fastv"
    _check_count(k, "k", 1, where)
    drop = exact(r, "r", where)
    origin: Data = {"method": "fastv", "k": k, "r": str(write_keep(drop))}
    keep: int | str = write_keep(1 - drop)
    if tokens is not None:
        _check_count(tokens, "tokens", 1, where)
        keep = round(tokens * (1 - drop))
        origin |= {"tokens": tokens, "rounding": "round(N(1-R)), half to even"}
    return _document({"stages": ({"before_layer": k, "keep": keep},)}, origin)


def pyramid(ratio: Ratio, layers: int, parts: int, tokens: int | None) -> Data:
    """PyramidDrop: ``parts`` equal runs of layers, run i keeping int(N ratio^i) tokens.

    Scored by the last row of the layer about to run (``from: next``).
    """
    where = "Schedule.pyramid"
    share = exact(ratio, "ratio", where)
    _check_count(parts, "parts", 1, where)
    _check_count(layers, "layers", parts, where)
    keeps: list[int | str] = [write_keep(share**i) for i in range(1, parts)]
    if tokens is not None:
        _check_count(tokens, "tokens", 1, where)
        keeps = [int(tokens * share**i) for i in range(1, parts)]
    cuts = [layers * i // parts for i in range(1, parts)]
    stages = tuple(
        {"before_layer": cut, "keep": keep} for cut, keep in zip(cuts, keeps, strict=True)
    )
    origin: Data = {"method": "pyramid", "lambda": str(write_keep(share)), "layers": layers}
    return _document({"score": {"from": "next"}, "stages": stages}, origin)


def vtw(k: int) -> Data:
    """VTW: no vision tokens from layer ``k`` on."""
    _check_count(k, "k", 1, "Schedule.vtw")
    return _document({"stages": ({"before_layer": k, "keep": 0},)}, {"method": "vtw", "k": k})


def from_keeps(keeps: Sequence[int | str | Fraction], options: Data, origin: Data) -> Data:
    """One keep per decoder layer; ``options`` are the other keys of ``prefill``."""
    return _document({**options, "keep": tuple(keeps)}, origin)


def from_deletions(deletions: Sequence[int], tokens: int) -> Data:
    """FitPrune's recipes: tokens deleted inside each layer, after attention and before o_proj.

    Layer l's deletion narrows layer l+1's input, so the last layer's must be 0. FitPrune ranks by
    cross x self attention, max over heads; this schedule uses the cross part (``query: text``).
    """
    where = "Schedule.from_deletions"
    _check_count(tokens, "tokens", 1, where)
    keeps = [tokens]
    for layer, deleted in enumerate(deletions):
        _check_count(deleted, f"deletions[{layer}]", 0, where)
        keeps.append(keeps[-1] - deleted)
    if keeps[-1] < 0 or len(keeps) < 2:
        raise ScheduleError(
            f"{sum(deletions)} deletions of {tokens} tokens in {len(deletions)} layers",
            where=where,
            hint="one number per layer, together at most the tokens of an image",
        )
    if keeps.pop() != keeps[-1]:
        raise ScheduleError(
            "tokens deleted inside the last layer", where=where, hint="write 0 for the last layer"
        )
    options = {"score": {"query": "text", "heads": "max"}, "drop_point": "inside"}
    return _document({**options, "keep": tuple(keeps)}, {"method": "fitprune"})


def _document(prefill: Data, origin: Data) -> Data:
    return {"version": _VERSION, "prefill": prefill, "origin": origin}


def _check_count(value: int, name: str, least: int, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ScheduleError(
            f"{name} is {value!r}", where=where, hint=f"give an integer from {least} on"
        )


_VERSION: Final = 1
