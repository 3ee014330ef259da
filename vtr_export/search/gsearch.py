"""G-Search: the fewest tokens a layer can do with, shallow to deep (arXiv 2412.00556)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

from vtr_export.search.candidate import Candidate, Score, Space

Spend: TypeAlias = Literal["even", "first"]
SPLIT: Final = 0.25  # a keep that passes is measured on every question, one that fails on few


class Verdict(Protocol):
    """What became of a candidate."""

    @property
    def candidate(self) -> Candidate:
        """What was asked."""
        ...

    @property
    def metric(self) -> float | None:
        """Over all questions; None where it was abandoned below the floor."""
        ...


class Judge(Protocol):
    """What answers questions about candidates: a ``Runner``."""

    def judge(self, candidate: Candidate, floor: float, ahead: Sequence[Candidate] = ()) -> Verdict:
        """Measure ``candidate``, or abandon it below ``floor``; ``ahead`` may be asked next."""
        ...

    def settle(self, candidate: Candidate, layer: int) -> None:
        """All that follow agree with ``candidate`` before ``layer``."""
        ...


@dataclass(frozen=True)
class Try:
    """One keep tried from ``layer`` on; ``metric`` is None where it was abandoned."""

    layer: int
    keep: int
    passed: bool
    metric: float | None


@dataclass(frozen=True)
class Violation:
    """Fewer tokens did better: the search's assumption does not hold there."""

    layer: int
    fewer: Try
    more: Try


@dataclass(frozen=True)
class Found:
    """``layer`` is the last that was decided; deeper ones keep what it keeps."""

    candidate: Candidate
    layer: int
    tries: tuple[Try, ...]

    def violations(self) -> tuple[Violation, ...]:
        """Pairs at one layer where the smaller keep passed or scored higher, the larger less."""
        return tuple(
            Violation(fewer.layer, fewer, more)
            for fewer in self.tries
            for more in self.tries
            if fewer.layer == more.layer and fewer.keep < more.keep and _is_better(fewer, more)
        )


def _is_better(fewer: Try, more: Try) -> bool:
    if fewer.metric is None or more.metric is None:
        return fewer.passed and not more.passed
    return fewer.metric > more.metric


def floors(
    unpruned: float, tolerance: float, layers: range, spend: Spend
) -> Callable[[int], float]:
    """What the metric may fall to at each of ``layers``, together never more than ``tolerance``.

    ``first``: to all of it from the first layer on; that cut will use it up. ``even``: an equal
    part is added with every layer, so that each cut has something to spend.
    """

    def floor(layer: int) -> float:
        share = (layer - layers.start + 1) / len(layers) if spend == "even" else 1.0
        return unpruned - tolerance * share

    return floor


def levels_of(parts: int, step: int) -> tuple[int, ...]:
    """Keeps to choose from: none, every multiple of ``step``, and all ``parts``."""
    return tuple(sorted({*range(0, parts, step), parts}))


def gsearch(
    judge: Judge,
    space: Space,
    score: Score,
    *,
    floor: Callable[[int], float],
    levels: Sequence[int],
    first: int = 1,
    checks: int = 1,
    split: float = SPLIT,
    decided: Callable[[Found], None] = lambda found: None,
) -> Found:
    """For each layer from ``first`` on, the least of ``levels`` with which the metric passes.

    At layer l it must reach ``floor(l)``, which must not rise with l. Keeps never grow, and layers
    not yet decided keep as many as the one under decision. Under the assumption that fewer tokens
    never do better, and with one floor for all, the result is the first in lexical order of all
    schedules that pass. The levels left at a layer are cut at ``split``, whichever part remains;
    ``checks`` smaller keeps that the assumption rules out are tried all the same: one that passes
    is taken, and shows in :meth:`Found.violations`. ``decided`` hears of each layer.
    """
    found = Found(Candidate((space.parts,) * space.layers, score, space.parts), 0, ())
    for layer in range(first, space.layers):
        judge.settle(found.candidate, layer)
        least = floor(layer)
        tries = _enclose(judge, found.candidate, layer, least, levels, split)
        extra = _unlikely(levels, _least(tries, found.candidate.keeps[layer]), tries, checks)
        tries += [_try(judge, found.candidate, layer, level, least) for level in extra]
        keep = _least(tries, found.candidate.keeps[layer])
        found = Found(found.candidate.with_tail(layer, keep), layer, (*found.tries, *tries))
        decided(found)
    return found


def _enclose(
    judge: Judge,
    candidate: Candidate,
    layer: int,
    floor: float,
    levels: Sequence[int],
    split: float,
) -> list[Try]:
    """Tries that enclose the least keep that passes; the current one is known to."""
    lower = [level for level in levels if level < candidate.keeps[layer]]
    tries, fails, passes = list[Try](), -1, len(lower)
    while passes - fails > 1:
        cut = _cut(fails, passes, split)
        ends = [(fails, cut), (cut, passes)]
        ahead = [lower[_cut(a, b, split)] for a, b in ends if b - a > 1]
        tries.append(_try(judge, candidate, layer, lower[cut], floor, ahead))
        fails, passes = (fails, cut) if tries[-1].passed else (cut, passes)
    return tries


def _cut(fails: int, passes: int, split: float) -> int:
    """A place strictly between the two."""
    return min(fails + max(1, round((passes - fails) * split)), passes - 1)


def _least(tries: Sequence[Try], current: int) -> int:
    """The least keep that passed, or the current one."""
    return min((one.keep for one in tries if one.passed), default=current)


def _unlikely(levels: Sequence[int], keep: int, tries: Sequence[Try], number: int) -> list[int]:
    """``number`` untried levels below ``keep``, evenly spread."""
    tried = {one.keep for one in tries}
    left = [level for level in levels if level < keep and level not in tried]
    return [left[(2 * i + 1) * len(left) // (2 * number)] for i in range(min(number, len(left)))]


def _try(
    judge: Judge,
    candidate: Candidate,
    layer: int,
    keep: int,
    floor: float,
    ahead: Iterable[int] = (),
) -> Try:
    follow = [candidate.with_tail(layer, level) for level in ahead]
    verdict = judge.judge(candidate.with_tail(layer, keep), floor, follow)
    passed = verdict.metric is not None and verdict.metric >= floor - 1e-9  # sums are rounded
    return Try(layer, keep, passed, verdict.metric)
