"""How an answer is scored: higher is better, and a set's score is the mean over its questions."""

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from math import inf, isfinite
from typing import Final

from vtr_export.errors import InputError
from vtr_export.search.questions.calibration import Question

_NUMBER: Final = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?(e[-+]?\d{1,3})?%?", re.ASCII)
_WORD: Final = r"[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]"  # Thai, kana, Han: no spaces
_MARKS: Final = frozenset(';/[]"{}()=+\\_-><@`,?!')
_ARTICLES: Final = frozenset({"a", "an", "the"})
_NUMERALS: Final = "zero one two three four five six seven eight nine ten".split()  # noqa: SIM905 one line instead of thirteen
_DIGITS: Final = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMERALS)}


@dataclass(frozen=True)
class Metric:
    """A score per question, from ``worst`` to ``best``.

    ``text`` scores an answer by its text; without it, the evaluator scores tokens and logits.
    ``version`` rises whenever any score changes.
    """

    name: str
    version: int
    about: str
    needs_answers: bool
    text: Callable[[str, Question], float] | None
    best: float = 1.0
    worst: float = 0.0

    @property
    def reach(self) -> float | None:
        """The greatest difference between two scores, None where nothing bounds it."""
        return self.best - self.worst if isfinite(self.worst) else None


def get_metric(name: str) -> Metric:
    """The metric of that name. Raises InputError."""
    if name in METRICS:
        return METRICS[name]
    close = get_close_matches(name, METRICS, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(f"no metric {name!r}", hint=f"{hint}known: {', '.join(METRICS)}")


def exact(given: str, question: Question) -> float:
    """1 where the text is one of the answers, but for case, white space and one final stop."""
    wanted = {_plain(answer) for answer in question.answers}
    return float(_plain(given) in wanted)


def contains(given: str, question: Question) -> float:
    """1 where any answer stands in the text as whole words: ``7`` is not in ``17`` or ``7.5``."""
    text = _plain(given)
    return float(any(_stands(_plain(answer), text) for answer in question.answers))


def vqa_accuracy(given: str, question: Question) -> float:
    """VQA accuracy (Antol et al. 2015): ``min(matches / 3, 1)``, people's answers as ``answers``.

    With ten answers or more, the mean over leaving each of them out, as the official script does.
    With fewer, ``min(matches / min(3, answers), 1)`` of all: an only answer must be matched.
    Both sides are normalised as there (:func:`vqa_words`), always.
    """
    wanted = [vqa_words(answer) for answer in question.answers]
    matches, people = wanted.count(vqa_words(given)), len(wanted)
    if people < 10:
        return min(matches / min(3, people), 1.0)
    left_out = matches * min((matches - 1) / 3, 1.0) if matches else 0.0
    return (left_out + (people - matches) * min(matches / 3, 1.0)) / people


def relaxed(given: str, question: Question) -> float:
    """ChartQA's relaxed accuracy (Masry et al. 2022): a number within 5 % of an answer, or exact.

    ``1,000`` is a number, ``5%`` is 0.05. Years are numbers like all others: 1990 passes for 2010.
    """
    value = _number(given)
    wanted = [_number(answer) for answer in question.answers]
    near = value is not None and any(
        20 * abs(value - answer) <= abs(answer) for answer in wanted if answer is not None
    )
    return float(near or exact(given, question))


METRICS: Final[Mapping[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("exact", 1, "the text is an answer", True, exact),
        Metric("vqa", 1, "VQA accuracy, min(matches / 3, 1)", True, vqa_accuracy),
        Metric("relaxed", 1, "numbers within 5 %, else exact", True, relaxed),
        Metric("contains", 1, "an answer stands in the text", True, contains),
        Metric(
            "agreement", 1, "share of the unpruned answer kept before another token", False, None
        ),
        Metric("kl", 1, "-KL(unpruned || pruned) of the next token, nats", False, None, 0.0, -inf),
    )
}


def vqa_words(text: str) -> str:
    """Lower case, digits for number words, without articles, punctuation and apostrophes.

    A mark is dropped where the text has it beside a space, or has a comma within a number; else
    it parts two words. A stop before a digit stays. The official script restores apostrophes from
    a list (``dont``), here both sides lose them; and what is an article alone (``A``) stays.
    """
    text = " ".join(text.lower().split())
    in_number = re.search(r"\d,\d", text) is not None
    alone = {mark for mark in _MARKS if in_number or f"{mark} " in text or f" {mark}" in text}
    parted = "".join(" " if char in _MARKS - alone else char for char in text if char not in alone)
    words = re.sub(r"\.(?!\d)|['\u2019]", "", parted).split()
    kept = [_DIGITS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(kept or words) or text


def _plain(text: str) -> str:
    """NFC, case folded, runs of white space one space, without one final stop."""
    words = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return words.removesuffix(".").rstrip() or words


def _stands(answer: str, text: str) -> bool:
    """Whether ``answer`` is in ``text`` and neither begins nor ends within a word or number."""
    before = rf"(?<!{_WORD})" if re.match(_WORD, answer) else ""
    after = rf"(?!{_WORD})" if re.search(rf"{_WORD}\Z", answer) else ""
    if answer[:1].isdigit():
        before += r"(?<!\d[.,])(?<!(?<!\w)[-\u2212])"
    if answer[-1:].isdigit():
        after += r"(?![.,]\d)"
    return re.search(before + re.escape(answer) + after, text) is not None


def _number(text: str) -> Decimal | None:
    text = text.strip().lower().replace("\u2212", "-")
    if not _NUMBER.fullmatch(text) or not re.search(r"^[-+]?\.?\d", text):
        return None
    value = Decimal(text.rstrip("%").replace(",", ""))
    return value.scaleb(-2) if text.endswith("%") else value
