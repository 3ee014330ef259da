"""Published recipes in their own notations, read as schedules and written back."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any, Final

from vtr_export import generators
from vtr_export.errors import InputError, ScheduleError
from vtr_export.keeps import write_keep
from vtr_export.recipe_text import LIST, Options, read_options
from vtr_export.schedule import Schedule
from vtr_export.schedule_document import Drop, Recycle, plain
from vtr_export.schedule_yaml import Key, Source
from vtr_export.steps import Amount, Steps

Data = dict[str, Any]
DECIMALS: Final = 15  # of a float that is written


@dataclass(frozen=True)
class Notation:
    """A paper's way to write a recipe.

    ``marks`` are the names that give it away, ``names`` what else it may say. ``form`` is what its
    code always does, as the language says it: a schedule that does otherwise cannot be written.
    """

    title: str
    marks: tuple[str, ...]
    names: tuple[str, ...]
    form: Mapping[Key, str]
    read: Callable[[Options], Data]
    write: Callable[[Schedule, Steps], str]


def read(text: str, where: str, notation: str | None = None, tokens: int | None = None) -> Schedule:
    """A schedule, from our language or from a recipe in one of :data:`NOTATIONS`.

    A recipe is JSON, YAML, a command line or lines ``name = value``. ``tokens`` (of an image) makes
    integers of its shares, rounded as the publication's code rounds. Raises ScheduleError with
    place and remedy.
    """
    names = {name for each in NOTATIONS.values() for name in (*each.marks, *each.names)}
    options = read_options(text, where, names)
    if notation is None:
        found = [name for name, each in NOTATIONS.items() if options.has(each.marks)]
        if not found:
            return Schedule.parse(text, where)
        notation = found[0]
    chosen = get_notation(notation)
    options.only((*chosen.marks, *chosen.names))
    try:
        data = chosen.read(options.with_tokens(tokens))
    except ScheduleError as error:  # a generator does not know the file
        place = error.where if error.where.startswith(where) else where
        raise ScheduleError(error.message, where=place, hint=error.hint) from None
    return Schedule.from_data(data, Source(where))


def write(schedule: Schedule, steps: Steps, notation: str) -> str:
    """The schedule as the publication's code takes it, on one line.

    Raises ScheduleError with the reason where the notation has no word for what it does.
    """
    chosen = get_notation(notation)
    line = chosen.write(schedule, steps)
    _check_form(schedule, chosen)
    return f"{line}\n"


def get_notation(name: str) -> Notation:
    """A notation by name."""
    if (notation := NOTATIONS.get(name)) is None:
        raise InputError(f"no notation {name!r}", hint=f"one of: {', '.join(NOTATIONS)}")
    return notation


def _read_fastv(given: Options) -> Data:
    for name in ("use_fastv", "use_fast_v"):
        _refuse_off(given, name)
    k = given.count("fastv_k", "K", "fast_v_agg_layer")
    if (rank := given.count_or_none("fast_v_attention_rank")) is not None:
        return generators.fastv_rank(k, rank)
    length = given.count_or_none("image_token_length", "N")
    tokens = given.tokens if given.tokens is not None else length
    return generators.fastv(k, given.ratio("fastv_r", "R"), tokens)


def _write_fastv(schedule: Schedule, steps: Steps) -> str:
    if len(steps.cuts) != 1:
        raise _refusal(schedule, f"FastV drops once, and this schedule {_times(steps)}")
    ((layer, keep),) = steps.cuts
    said: Data = {"use_fastv": True, "fastv_k": layer}
    tokens = steps.tokens
    if tokens is None:
        return json.dumps(said | {"fastv_r": _decimal(schedule, 1 - _share(schedule, keep))})
    dropped = Fraction(tokens - int(keep), tokens)
    r = _shortest(dropped, lambda r: round(tokens * (1 - r)) == keep)
    return json.dumps(said | {"fastv_r": r, "image_token_length": tokens})


def _read_pyramid(given: Options) -> Data:
    layers, ratios = given.items("layer_list"), given.items("image_token_ratio_list")
    return generators.pyramid_list(layers, ratios, given.tokens)


def _write_pyramid(schedule: Schedule, steps: Steps) -> str:
    tokens, ratios = steps.tokens, []
    for _, keep in steps.cuts:
        if tokens is None:
            ratios.append(_decimal(schedule, _share(schedule, keep)))
        else:
            ratios.append(_truncated(int(keep), tokens))
    layers = json.dumps([layer for layer, _ in steps.cuts], separators=(",", ":"))
    shares = json.dumps(ratios, separators=(",", ":"))
    return f"--layer_list '{layers}' --image_token_ratio_list '{shares}'"


def _truncated(keep: int, tokens: int) -> float:
    return _shortest(Fraction(keep, tokens), lambda ratio: int(tokens * ratio) == keep)


def _read_sparsevlm(given: Options) -> Data:
    version = str(given.values.get("USE_VERSION", "1_0")).replace("_", ".")
    if version not in ("1.0", "2.0"):
        raise given.error("USE_VERSION", f"USE_VERSION is {version}", "1_0, or 2_0: SparseVLM+")
    plus = version == "2.0"
    if given.has(_KEEP_LISTS):
        name, _ = given.find(*_KEEP_LISTS)
        layers: tuple[Any, ...] = generators.SPARSEVLM_LAYERS
        if given.has(("pruning_loc",)):
            layers = given.items("pruning_loc")
        return generators.sparsevlm_list(layers, given.items(name), plus)
    return generators.sparsevlm(given.count("RETAIN_TOKN", "retained_tokens"), plus)


def _write_sparsevlm(schedule: Schedule, steps: Steps) -> str:
    plus = schedule.prefill.positions == "original"
    if schedule.prefill.merge != (wanted := Drop() if plus else Recycle()):
        merge = f"{{by: {wanted.by}}}"
        raise ScheduleError(
            f"{'SparseVLM+' if plus else 'SparseVLM'} has merge: {merge}, with its own numbers",
            where=schedule.source.at(("prefill", "merge")),
            hint=f"write merge: {merge}, if that may be",
        )
    version = "2_0" if plus else "1_0"
    layers = tuple(layer - 1 for layer, _ in steps.cuts)
    keeps = tuple(_count(schedule, keep, "SparseVLM") for _, keep in steps.cuts)
    published = generators.SPARSEVLM_PLUS if plus else generators.SPARSEVLM
    for tokens, known in published.items():
        if (layers, keeps) == (generators.SPARSEVLM_LAYERS, known):
            return f"USE_VERSION={version} RETAIN_TOKN={tokens}"
    said = {"pruning_loc": layers, "sparse_token_list": keeps, "USE_VERSION": version}
    return json.dumps(said)


def _read_vtw(given: Options) -> Data:
    _refuse_off(given, "use_vtw")
    return generators.vtw(given.count("k", "K", "vtw_k"))


def _write_vtw(schedule: Schedule, steps: Steps) -> str:
    if [keep for _, keep in steps.cuts] != [0]:
        raise _refusal(schedule, f"VTW drops everything at once, and this schedule {_times(steps)}")
    return f"--use_vtw --k={steps.cuts[0][0]}"


def _read_fitprune(given: Options) -> Data:
    if given.has(("reduction_ratio",)):
        return generators.fitprune(Fraction(given.count("reduction_ratio"), 100))
    tokens = 576 if given.tokens is None else given.tokens
    return generators.from_deletions(given.items(LIST, "deletions"), tokens)


def _write_fitprune(schedule: Schedule, steps: Steps) -> str:
    keeps = steps.per_layer()
    if keeps is None or steps.tokens is None:
        raise _refusal(
            schedule,
            "FitPrune lists what every layer deletes, and this schedule does not say their number",
            "give --model, or --layers and --tokens",
        )
    counts = [_count(schedule, keep, "FitPrune") for keep in keeps]
    return json.dumps([a - b for a, b in zip(counts, [*counts[1:], counts[-1]], strict=True)])


def _refuse_off(given: Options, name: str) -> None:
    if given.values.get(name, True) is not True:
        raise given.error(name, f"{name} is off: nothing is dropped", "set it, or leave it out")


def _check_form(schedule: Schedule, notation: Notation) -> None:
    """What its code always does must be what the schedule says."""
    prefill = plain(schedule.document)["prefill"]
    for key, wanted in notation.form.items():
        said: Any = prefill
        for part in key:
            said = said[part]
        if said != wanted:
            name = ".".join(map(str, key))
            raise ScheduleError(
                f"{notation.title} has {name}: {wanted}, and this schedule {said}",
                where=schedule.source.at(("prefill", *key)),
                hint=f"write {key[-1]}: {wanted} into the schedule, if that may be",
            )


def _times(steps: Steps) -> str:
    places = [f"{write_keep(keep)} from layer {layer} on" for layer, keep in steps.cuts]
    return f"keeps {', '.join(places)}" if places else "drops nothing"


def _share(schedule: Schedule, keep: Amount) -> Fraction:
    if isinstance(keep, int) and keep:
        raise _refusal(
            schedule,
            f"{keep} tokens are no share as long as their number is not known",
            "give --tokens or --model",
        )
    return Fraction(keep)


def _count(schedule: Schedule, keep: Amount, title: str) -> int:
    if isinstance(keep, Fraction) and keep:
        raise _refusal(
            schedule,
            f"{title} counts tokens, and this schedule keeps {write_keep(keep)} of them",
            "give --tokens or --model",
        )
    return int(keep)


def _decimal(schedule: Schedule, share: Fraction) -> float:
    """The float that is written as exactly this share."""
    if Fraction(repr(float(share))) != share:
        raise _refusal(
            schedule, f"{write_keep(share)} is no decimal number", "give --tokens or --model"
        )
    return float(share)


def _shortest(share: Fraction, is_right: Callable[[float], bool]) -> float:
    """The float of fewest decimals from ``share`` on with which the code does what it should."""
    return next(filter(is_right, _decimals(share)))


def _decimals(share: Fraction) -> Iterator[float]:
    for digits in range(1, DECIMALS):
        scaled = ceil(share * 10**digits)
        for number in (scaled - 1, scaled, scaled + 1):
            if 0 <= number <= 10**digits:
                yield number / 10**digits


def _refusal(schedule: Schedule, message: str, hint: str = "") -> ScheduleError:
    return ScheduleError(
        message, where=schedule.source.at(("prefill",)), hint=hint or "--to keep or stages says it"
    )


_KEEP_LISTS: Final = (
    "sparse_token_list",
    *(f"sparse_token_list_{tokens}" for tokens in generators.SPARSEVLM),
)


DROPS: Final[dict[Key, str]] = {("merge", "by"): "drop"}


def _form(
    source: str, query: str, heads: str, rule: str = "attention", **others: str
) -> Mapping[Key, str]:
    said = {"from": source, "rule": rule, "query": query, "heads": heads}
    score: dict[Key, str] = {("score", name): word for name, word in said.items()}
    form = {"rank": "joint", "drop_point": "between"} | others
    plainly: dict[Key, str] = {(name,): word for name, word in form.items()}
    return score | plainly | DROPS


NOTATIONS: Final[Mapping[str, Notation]] = {
    "fastv": Notation(
        "FastV",
        ("fastv_k", "fastv_r", "R", "fast_v_agg_layer", "fast_v_attention_rank"),
        (
            *("K", "N", "use_fastv", "image_token_start_index", "image_token_length"),
            *("use_fast_v", "fast_v_sys_length", "fast_v_image_token_length", "fast_v_inplace"),
        ),
        _form("previous", "last", "mean", positions="original"),
        _read_fastv,
        _write_fastv,
    ),
    "pyramiddrop": Notation(
        "PyramidDrop",
        ("layer_list", "image_token_ratio_list"),
        (),
        _form("next", "last", "mean", positions="repacked"),
        _read_pyramid,
        _write_pyramid,
    ),
    "sparsevlm": Notation(
        "SparseVLM",
        ("RETAIN_TOKN", "retained_tokens", *_KEEP_LISTS),
        ("USE_VERSION", "pruning_loc"),
        {
            key: said
            for key, said in _form("previous", "raters", "mean").items()
            if key not in DROPS
        },
        _read_sparsevlm,
        _write_sparsevlm,
    ),
    "vtw": Notation(
        "VTW",
        ("use_vtw", "vtw_k"),
        ("k", "K"),
        {("positions",): "original", ("drop_point",): "between"},
        _read_vtw,
        _write_vtw,
    ),
    "fitprune": Notation(
        "FitPrune",
        ("reduction_ratio", "deletions", LIST),
        (),
        _form("previous", "text", "max", "self_cross", positions="original", drop_point="inside"),
        _read_fitprune,
        _write_fitprune,
    ),
}
