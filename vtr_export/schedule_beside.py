"""Which rules, query rows and merges a schedule may name beside each other."""

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from vtr_export.errors import ScheduleError
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
