"""Methods of the literature as schedules: each function writes the data of one document."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Final

from vtr_export.errors import ScheduleError
from vtr_export.keeps import MAX_PART, read_share, write_keep

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

    Its code keeps round(N(1-R)), in floating point; with ``tokens`` = N that integer is written,
    without it the exact share, rounded down.
    """
    where = "Schedule.fastv"
    _check_count(k, "k", 1, where)
    drop = exact(r, "r", where)
    origin: Data = {"method": "fastv", "k": k, "r": str(write_keep(drop))}
    keep: int | str = write_keep(1 - drop)
    if tokens is not None:
        _check_count(tokens, "tokens", 1, where)
        keep = round(tokens * (1 - float(drop)))
        origin |= {"tokens": tokens, "rounding": "round(N(1-R)), half to even"}
    return _document({"stages": ({"before_layer": k, "keep": keep},)}, origin)


def fastv_rank(k: int, rank: int) -> Data:
    """FastV as its first code spells it: ``rank`` tokens are left before layer ``k``."""
    where = "Schedule.fastv"
    _check_count(k, "k", 1, where)
    _check_count(rank, "rank", 0, where)
    stages = ({"before_layer": k, "keep": rank},)
    return _document({"stages": stages}, {"method": "fastv", "k": k, "rank": rank})


def pyramid(
    ratio: Ratio, layers: int, parts: int, tokens: int | None, positions: str = "original"
) -> Data:
    """PyramidDrop: ``parts`` equal runs of layers, run i keeping int(N ratio^i) tokens.

    Scored by the last row of the layer about to run (``from: next``).
    """
    where = "Schedule.pyramid"
    share = exact(ratio, "ratio", where)
    _check_count(parts, "parts", 1, where)
    _check_count(layers, "layers", parts, where)
    cuts = [layers * i // parts for i in range(1, parts)]
    origin: Data = {"method": "pyramid", "lambda": str(write_keep(share)), "layers": layers}
    return pyramid_list(cuts, [share**i for i in range(1, parts)], tokens, positions, origin)


def pyramid_list(
    layers: Sequence[int],
    ratios: Sequence[Ratio],
    tokens: int | None,
    positions: str = "repacked",
    origin: Data | None = None,
) -> Data:
    """PyramidDrop's two lists: from ``layers[i]`` on, int(N ratios[i]) tokens, in floating point.

    Its code numbers the survivors anew (``positions: repacked``).
    """
    where = "Schedule.pyramid"
    shares = [exact(ratio, f"ratios[{i}]", where) for i, ratio in enumerate(ratios)]
    if len(layers) != len(shares):
        raise ScheduleError(
            f"{len(layers)} layers and {len(shares)} ratios",
            where=where,
            hint="one ratio of all tokens for each layer",
        )
    keeps: list[int | str] = [write_keep(share) for share in shares]
    if tokens is not None:
        _check_count(tokens, "tokens", 1, where)
        keeps = [int(tokens * float(share)) for share in shares]
    stages = _stages(layers, keeps)
    prefill: Data = {"score": {"from": "next"}, "positions": positions, "stages": stages}
    return _document(prefill, origin or {"method": "pyramid"})


def sparsevlm(tokens: int, plus: bool) -> Data:
    """A published keep list of SparseVLM, or of SparseVLM+, named after its ``tokens``."""
    lists = SPARSEVLM_PLUS if plus else SPARSEVLM
    if tokens not in lists:
        raise ScheduleError(
            f"tokens is {tokens!r}",
            where="Schedule.sparsevlm",
            hint=f"published: {', '.join(map(str, lists))}",
        )
    return sparsevlm_list(SPARSEVLM_LAYERS, lists[tokens], plus, tokens)


def sparsevlm_list(
    layers: Sequence[int], keeps: Sequence[int], plus: bool, tokens: int | None = None
) -> Data:
    """SparseVLM: ``keeps[i]`` tokens are left after layer ``layers[i]``, which runs in full.

    SparseVLM (v1 of its code) appends means of clusters of dropped tokens and numbers all anew.
    SparseVLM+ keeps positions and merges nothing; it also corrects its score for positions and
    ranks by the heads that look at the image most, which the language has no words for: its
    origin says that all heads rank, uncorrected.
    """
    where = "Schedule.sparsevlm"
    for i, layer in enumerate(layers):
        _check_count(layer, f"layers[{i}]", 0, where)
    if len(layers) != len(keeps):
        raise ScheduleError(
            f"{len(layers)} layers and {len(keeps)} keeps",
            where=where,
            hint="one number of tokens for each layer",
        )
    prefill: Data = {
        "score": {"query": "raters"},
        "positions": "original" if plus else "repacked",
        "merge": {"by": "drop" if plus else "recycle"},
        "stages": _stages([layer + 1 for layer in layers], keeps),
    }
    origin: Data = {"method": "sparsevlm"}
    if plus:
        origin = {"method": "sparsevlm+", "score": "uncorrected, mean of all heads"}
    return _document(prefill, origin | ({} if tokens is None else {"tokens": tokens}))


def mustdrop(tokens: int, windows: int | None) -> Data:
    """MustDrop's published thresholds, named after the ``tokens`` they leave on average.

    ``windows`` of an image are merged in its tower, of 9 tokens each; None: those that are alike.
    Its code's own defaults, (1.0, 0), drop nothing.
    """
    if tokens not in MUSTDROP:
        raise ScheduleError(
            f"tokens is {tokens!r}",
            where="Schedule.mustdrop",
            hint=f"published: {', '.join(map(str, MUSTDROP))}",
        )
    vision: Data = {"method": "mustdrop"}
    if windows is not None:
        _check_count(windows, "windows", 0, "Schedule.mustdrop")
        vision["windows"] = windows
    whole, single = MUSTDROP[tokens]
    prefill = {
        "score": {"query": "text"},
        "positions": "repacked",
        "threshold": {"whole": whole, "single": single},
        "protect": "keys",
        "stages": _stages([layer + 1 for layer in MUSTDROP_LAYERS], ["100%"] * 4),
    }
    data = _document(prefill, {"method": "mustdrop", "tokens": tokens})
    return data | {"vision": (vision,), "decode": ({"method": "mustdrop"},)}


def vtw(k: int) -> Data:
    """VTW: no vision tokens from layer ``k`` on."""
    _check_count(k, "k", 1, "Schedule.vtw")
    return _document({"stages": ({"before_layer": k, "keep": 0},)}, {"method": "vtw", "k": k})


def from_keeps(keeps: Sequence[int | str | Fraction], options: Data, origin: Data) -> Data:
    """One keep per decoder layer; ``options`` are the other keys of ``prefill``."""
    return _document({**options, "keep": tuple(keeps)}, origin)


def fitprune(reduction: Ratio) -> Data:
    """A published recipe of FitPrune for LLaVA-1.5-7B, named after the FLOPs it saves."""
    share = exact(reduction, "reduction", "Schedule.fitprune")
    if share not in FITPRUNE:
        raise ScheduleError(
            f"reduction is {reduction!r}",
            where="Schedule.fitprune",
            hint=f"known in full: {', '.join(str(write_keep(known)) for known in FITPRUNE)}",
        )
    data = from_deletions(FITPRUNE[share], 576)
    return data | {"origin": {"method": "fitprune", "reduction": write_keep(share)}}


def ficoco(vision: int | None, prefill: int | None, layers: int, tokens: int) -> Data:
    """FiCoCo-V, FiCoCo-L or both: tokens that leave each layer of the tower, of the decoder.

    The decoder's from layer 5 on, between attention and MLP, as long as some are left; its last
    layer drops none here. ``tokens`` are an image's that enter the decoder.
    """
    where = "Schedule.ficoco"
    for name, count in (("vision", vision), ("prefill", prefill), ("tokens", tokens)):
        _check_count(1 if count is None else count, name, 1, where)
    if vision is None and prefill is None:
        raise ScheduleError("no tokens leave", where=where, hint="give vision, prefill or both")
    data: Data = {"version": _VERSION}
    if vision is not None:
        data["vision"] = ({"method": "ficoco_v", "each": vision},)
    if prefill is not None:
        _check_count(layers, "layers", FICOCO_LAYER + 2, where)
        data["prefill"] = {
            "score": {"rule": "redundancy", "query": "text"},
            "positions": "repacked",
            "drop_point": "attended",
            "merge": {"by": "correlate"},
            "keep": _ficoco_keeps(prefill, layers, tokens),
        }
    parts = "v" * (vision is not None) + "l" * (prefill is not None)
    return data | {"origin": {"method": f"ficoco_{parts}"}}


def _ficoco_keeps(each: int, layers: int, tokens: int) -> tuple[int, ...]:
    """Tokens entering each layer; what would leave none is not done."""
    keeps = [tokens]
    for layer in range(layers - 1):
        left = keeps[-1] - each if layer >= FICOCO_LAYER else keeps[-1]
        keeps.append(left if left > 0 else keeps[-1])
    return tuple(keeps)


def from_deletions(deletions: Sequence[int], tokens: int) -> Data:
    """FitPrune's recipes: tokens deleted inside each layer, after attention and before o_proj.

    Layer l's deletion narrows layer l+1's input, so the last layer's must be 0. FitPrune ranks by
    cross x self attention, max over heads (arXiv 2409.10197, as in its code).
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
    options = {
        "score": {"rule": "self_cross", "query": "text", "heads": "max"},
        "drop_point": "inside",
    }
    return _document({**options, "keep": tuple(keeps)}, {"method": "fitprune"})


def _document(prefill: Data, origin: Data) -> Data:
    return {"version": _VERSION, "prefill": prefill, "origin": origin}


def _stages(layers: Sequence[int], keeps: Sequence[int | str]) -> tuple[Data, ...]:
    pairs = zip(layers, keeps, strict=True)
    return tuple({"before_layer": layer, "keep": keep} for layer, keep in pairs)


def _check_count(value: int, name: str, least: int, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ScheduleError(
            f"{name} is {value!r}", where=where, hint=f"give an integer from {least} on"
        )


_VERSION: Final = 1

# Published integers, for images of 576 tokens and decoders of 32 layers.
FICOCO_LAYER: Final = 5  # of the decoder: the first that tokens leave
SPARSEVLM_LAYERS: Final = (2, 6, 15)
SPARSEVLM: Final[Mapping[int, tuple[int, ...]]] = {
    192: (300, 200, 110),
    128: (303, 110, 36),
    96: (238, 48, 26),
    64: (66, 30, 17),
}
SPARSEVLM_PLUS: Final[Mapping[int, tuple[int, ...]]] = {
    192: (300, 200, 118),
    128: (238, 108, 60),
    96: (246, 54, 28),
    64: (66, 34, 20),
}
# Thresholds (whole, single): behind these layers a token goes that is below both.
MUSTDROP_LAYERS: Final = (2, 6, 10, 14)
MUSTDROP: Final[Mapping[int, tuple[float, float]]] = {
    192: (0.001, 0.001),
    128: (0.0012, 0.001),
    64: (0.011, 0.01),
}
# Eight layers a line:
# fmt: off
FITPRUNE: Final[Mapping[Fraction, tuple[int, ...]]] = {
    Fraction(1, 2): (
        3, 7, 49, 24, 29, 17, 59, 41,
        26, 8, 10, 6, 2, 5, 7, 2,
        30, 3, 13, 27, 5, 23, 2, 1,
        0, 0, 1, 1, 2, 0, 0, 0,
    ),
    Fraction(3, 5): (
        14, 33, 89, 36, 36, 20, 55, 21,
        18, 4, 7, 5, 2, 5, 7, 4,
        26, 5, 11, 24, 4, 18, 2, 1,
        0, 0, 1, 0, 1, 0, 0, 0,
    ),
    Fraction(9, 10): (
        262, 153, 80, 19, 13, 1, 2, 0,
        0, 0, 0, 0, 0, 0, 0, 1,
        1, 2, 1, 2, 0, 1, 0, 0,
        0, 0, 0, 1, 0, 0, 0, 0,
    ),
}
# fmt: on
