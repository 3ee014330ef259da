"""Which rules, query rows and merges a schedule may name beside each other."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from vtr_export.errors import ScheduleError
from vtr_export.reductions import Tower, VisionReduction
from vtr_export.resolved import Keep
from vtr_export.schedule_document import Correlate, Document, Prefill, Recycle
from vtr_export.schedule_yaml import Key

Error = Callable[[Key, str, str], ScheduleError]
Foreign = tuple[tuple[str, ...], bool, str]  # a key of prefill, whether it does not fit, what does


def check_beside(document: Document, model: Any, error: Error) -> None:
    """ScheduleError, made by ``error``, for words that no definition covers together."""
    prefill = document.prefill
    if prefill.score.rule != "attention" or isinstance(prefill.merge, Correlate):
        _check_blocks(prefill, bool(getattr(model, "crosses", ())), error)
    if isinstance(prefill.merge, Recycle):
        _check_recycling(document, prefill.merge, model.tokens_per_image, error)
    if prefill.score.query == "raters":
        _refuse("query raters is not defined", _unfit(prefill), error)
    if prefill.threshold is not None or prefill.protect != "none":
        _check_filter(prefill, bool(getattr(model, "crosses", ())), error)


def check_protected(
    document: Document, tower: Tower | None, keeps: Mapping[Key, Keep], error: Error
) -> None:
    """ScheduleError unless a reduction protects tokens, and each cut keeps as many."""
    key = ("prefill", "protect")
    telling = [kind for kind in document.vision if kind.PROTECTS]
    if not telling or tower is None:
        raise error(key, "protect is keys, and no vision reduction protects any", "protect: none")
    for kind in document.vision[1:]:
        if kind.MERGES or kind.form != "static":
            what = f"protect is keys, but behind {kind.method} it is not known how many are left"
            raise error(key, what, "list it first, or protect: none")
    for count, protected in _protected(document.vision, tower):
        for place, keep in keeps.items():
            if keep.of(count) < protected:
                what = f"keep leaves {keep.of(count)} of {count} tokens, and {protected} are"
                raise error(place, f"{what} protected", "keep more, or fewer keys")


def _protected(reductions: Sequence[VisionReduction], tower: Tower) -> Iterator[tuple[int, int]]:
    """Tokens that an image may have left, and how many of them are protected at most."""
    first, *others = reductions
    left = first.leaves(tower)
    for other in others:
        left = other.leaves(left)
    for count in range(first.fewest(tower), first.count(tower) + 1):
        most = left.grid.tokens if others else count
        yield most, min(most, first.protected(count))


def _check_blocks(prefill: Prefill, crosses: bool, error: Error) -> None:
    """A rule or a merge that looks at all vision rows."""
    merges = isinstance(prefill.merge, Correlate)
    said = f"rule {prefill.score.rule}" if not merges else "merge by correlate"
    kinds = (
        (("score", "from"), prefill.score.source != "previous", "previous"),
        (("score", "query"), prefill.score.query == "raters", "text"),
        *_unfit(prefill),
        (("merge",), isinstance(prefill.merge, Recycle), "{by: drop}"),
        (("drop_point",), merges and prefill.drop_point == "inside", "attended"),
    )
    _refuse(f"{said} is defined on one layer's whole attention, not", kinds, error)
    if crosses:
        what = f"{said}: here images are keys, and have no rows"
        raise error(("prefill",), what, "rule: attention")


def _check_recycling(document: Document, merge: Recycle, tokens: int | None, error: Error) -> None:
    """Clusters behind the kept tokens."""
    prefill, key = document.prefill, ("prefill", "merge")
    if not isinstance(merge.share, Fraction):
        raise error((*key, "share"), f"share is {merge.share}", "write a share, 30%")
    if tokens is None:
        why = "the number of clusters must be known, and this model's tokens per image vary"
        raise error(key, f"merge by recycle: {why}", "merge: {by: drop}")
    kinds = (
        (("rank",), prefill.rank != "joint", "joint"),
        (("drop_point",), prefill.drop_point != "between", "between"),
        *_unfit(prefill),
    )
    _refuse("merge by recycle is not defined", kinds, error)
    if document.decode:
        why = "a cluster has no row of its own in the caches of earlier layers, to be compacted to"
        raise error(("decode",), why, "no decode part")


def _check_filter(prefill: Prefill, crosses: bool, error: Error) -> None:
    """Counts that follow from attention, and tokens that come before all others."""
    said = "threshold" if prefill.threshold is not None else "protect: keys"
    _refuse(f"{said} is not defined", ((("rank",), prefill.rank != "joint", "joint"),), error)
    if crosses:
        what = f"{said}: here images are keys of cross-attention"
        raise error(("prefill", said.partition(":")[0]), what, "leave it out")
    if prefill.threshold is not None and prefill.keep is not None:
        what = "threshold drops where stages say, and keep names every layer"
        raise error(("prefill", "keep"), what, "stages: [{before_layer: 3, keep: 100%}]")


def _unfit(prefill: Prefill) -> tuple[Foreign, ...]:
    return (
        (("threshold",), prefill.threshold is not None, "no threshold"),
        (("protect",), prefill.protect != "none", "none"),
    )


def _refuse(said: str, kinds: Iterable[Foreign], error: Error) -> None:
    for key, is_foreign, wanted in kinds:
        if is_foreign:
            hint = f"{key[-1]}: {wanted}"
            raise error(("prefill", *key), f"{said} with this {key[-1]}", hint)
