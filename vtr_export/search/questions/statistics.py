"""Whether two runs over the same questions differ, where several questions share an image."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vtr_export.extras import require
from vtr_export.search.questions.calibration import Question
from vtr_export.search.questions.metrics import Metric

Floats = NDArray[np.float64]
Groups = NDArray[np.int64]

CONFIDENCE: Final = 0.95
_COMMONEST: Final = 20  # answers that are tried as the only one


@dataclass(frozen=True)
class Difference:
    """Mean of ``first - second`` over ``questions`` about ``groups`` independent groups of images.

    ``low`` to ``high`` is its 95 % confidence interval. ``better`` and ``worse`` count questions.
    ``p_value``, of scores that are 0 or 1 only: see :func:`paired_difference`.
    """

    mean: float
    low: float
    high: float
    questions: int
    groups: int
    better: int
    worse: int
    p_value: float | None

    def __str__(self) -> str:
        mean, low, high = (f"{100 * value:+.2f}" for value in (self.mean, self.low, self.high))
        images = f", {self.groups} images" if self.groups < self.questions else ""
        return f"{mean} points [{low}, {high}] ({self.questions} questions{images})"

    def to_data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def paired_difference(
    first: Floats, second: Floats, groups: Groups, *, reach: float | None = 1.0
) -> Difference:
    """Compare per-question scores ``[n]`` of the same questions; equal ``groups`` are dependent.

    The interval is Student's around the mean with a cluster-robust standard error, groups - 1
    degrees of freedom (Liang and Zeger 1986). ``reach`` is the greatest difference one question
    can make: two questions that differ by plus and minus that are added (Bonett and Price 2012,
    for pairs of proportions), so that few questions that all agree do not claim certainty. None
    where nothing bounds it. Nothing is drawn by chance.

    ``p_value`` is of the exact two-sided sign test over groups whose scores differ in sum: where
    each question is a group of its own, McNemar's exact test.
    """
    change = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    if change.ndim != 1 or not change.shape == np.shape(groups) or not change.size:
        raise ValueError(f"{np.shape(first)=}, {np.shape(second)=}, {np.shape(groups)=}")
    if not np.isfinite(change).all():
        raise ValueError("a score is not finite")
    _, rows = np.unique(groups, return_inverse=True)
    low, high = _interval(change, rows, reach)
    is_binary = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    return Difference(
        mean=float(change.mean()),
        low=low,
        high=high,
        questions=change.size,
        groups=int(rows.max()) + 1,
        better=int((change > 0).sum()),
        worse=int((change < 0).sum()),
        p_value=_sign_test(np.bincount(rows, change)) if is_binary else None,
    )


def image_groups(questions: Sequence[Question]) -> Groups:
    """A number per question, ``[n]``; equal where images are shared, directly or by a third."""
    sparse, csgraph = _scipy("sparse"), _scipy("sparse.csgraph")
    names = sorted({sha256 for question in questions for sha256 in question.image_sha256})
    place = {sha256: len(questions) + row for row, sha256 in enumerate(names)}
    edges = [(i, place[name]) for i, q in enumerate(questions) for name in q.image_sha256]
    rows, columns = np.array(edges, np.int64).reshape(-1, 2).T
    size = len(questions) + len(names)
    graph = sparse.coo_array((np.ones(len(edges)), (rows, columns)), shape=(size, size))
    _, found = csgraph.connected_components(graph, directed=False)
    groups: Groups = found[: len(questions)].astype(np.int64)
    return groups


def at_chance(scores: Floats, questions: Sequence[Question], metric: Metric) -> str | None:
    """A warning where ``scores`` are not shown to be above always giving one common answer.

    Shown means by the 95 % interval of :func:`paired_difference`. None too for a metric that
    looks at no text: the unpruned model agrees with itself.
    """
    if metric.text is None:
        return None
    counts = Counter(answer for question in questions for answer in set(question.answers))
    best, answer = max(
        (
            (np.array([metric.text(common, q) for q in questions]), common)
            for common, _ in counts.most_common(_COMMONEST)
        ),
        key=lambda pair: float(pair[0].mean()),
    )
    if paired_difference(scores, best, image_groups(questions)).low > 0:
        return None
    return (
        f"the unpruned model scores {np.mean(scores):.1%} ({metric.name}), and always answering "
        f"{answer!r} scores {best.mean():.1%}: there may be nothing to preserve"
    )


def _interval(change: Floats, rows: Groups, reach: float | None) -> tuple[float, float]:
    bound = np.inf if reach is None else reach
    if rows.max() == 0:
        return -bound, bound
    if reach is not None:
        change = np.append(change, (reach, -reach))
        rows = np.append(rows, rows.max() + np.array((1, 2)))
    groups, mean = int(rows.max()) + 1, float(change.mean())
    sums = np.bincount(rows, change - mean)
    error = np.sqrt(groups / (groups - 1) * np.square(sums).sum()) / change.size
    half = float(_scipy("stats").t.ppf((1 + CONFIDENCE) / 2, groups - 1) * error)
    return max(mean - half, -bound), min(mean + half, bound)


def _sign_test(sums: NDArray[Any]) -> float:
    better, worse = int((sums > 0).sum()), int((sums < 0).sum())
    if better + worse == 0:
        return 1.0
    return float(_scipy("stats").binomtest(better, better + worse).pvalue)


def _scipy(part: str) -> Any:
    return require(f"scipy.{part}", "search", "a confidence interval")
