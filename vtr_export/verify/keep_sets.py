"""Two keep-sets side by side: how much they share, and whether rounding explains the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from vtr_export.manifest import Gate
from vtr_export.verify.case import Array, Case, Ints
from vtr_export.verify.gates import Bars, at_least, at_most, differing
from vtr_export.verify.play import Played

Columns: TypeAlias = frozenset[int]
CLEAR: Final = 8.0  # times a threshold


@dataclass(frozen=True)
class Row:
    """One row of one call at one cut, in columns of the unpruned sequence."""

    case: str
    row: int
    cut: int
    vision: tuple[Columns, Columns]  # kept: by the graph, by the reference
    others: tuple[Columns, Columns]  # text, and pads
    excused: Columns  # the reference scores them within rounding of its boundary
    margin: float
    by_threshold: bool = False  # how many stay, pads among them, follows from the scores

    @property
    def overlap(self) -> float:
        """Intersection over union."""
        ours, theirs = self.vision
        return len(ours & theirs) / max(1, len(ours | theirs)) if ours | theirs else 1.0

    @property
    def is_of_unlike_count(self) -> bool:
        """Whether the graph keeps another number of tokens, or lacks a column that is none."""
        (ours, theirs), others = self.vision, self.others
        if self.by_threshold:
            return bool((ours ^ theirs) - self.excused) or others[0] != others[1]
        return len(ours) != len(theirs) or others[0] != others[1]

    @property
    def excused_overlap(self) -> float:
        """Intersection over union when swaps of near ties do not count."""
        ours, theirs = self.vision
        union = (ours | theirs) - (self.excused - (ours & theirs))
        return len(ours & theirs) / len(union) if union else 1.0


def compare(case: Case, kept: Sequence[Ints], near_tie: float) -> list[Row]:
    """Every row of ``case`` at every cut; ``kept`` is what the graph kept."""
    return [row for b in range(case.batch) for row in _compare_row(case, kept, b, near_tie)]


def _compare_row(case: Case, kept: Sequence[Ints], b: int, near_tie: float) -> list[Row]:
    question = case.question
    count, vision_index, real = question.cut_columns(b)
    columns = np.arange(count)
    ours, theirs, vision = columns, columns, set(real.tolist())
    excused: Columns = frozenset()
    rows = []
    for cut, (mine, expected) in enumerate(zip(kept, case.kept, strict=True)):
        scored = theirs[vision_index]
        ours, theirs = _named(ours, mine[b]), theirs[expected[b]]
        sides = frozenset(ours.tolist()), frozenset(theirs.tolist())
        pads = set(np.flatnonzero(question.attention_mask[b] == 0)) if case.by_threshold else set()
        made = scored[case.labels[cut][b] >= 0] if case.labels else scored[:0]
        as_themselves = sides[1] - set(made.tolist())  # a cluster stands in its centre's column
        ranked = scored, case.scores[cut][b]
        excused |= _near_ties(*ranked, as_themselves, vision, near_tie, case.by_threshold)
        rows.append(
            Row(
                question.name,
                b,
                cut,
                (sides[0] & vision, sides[1] & vision),
                (sides[0] - vision - pads, sides[1] - vision - pads),
                excused,
                float(case.margins[cut][b]),
                case.by_threshold,
            )
        )
        vision_index = case.kept_vision[cut][b]
    return rows


def _named(columns: Ints, kept: Ints) -> Ints:
    """The columns that ``kept`` names; a graph may name some that do not exist."""
    named: Ints = columns[kept[(kept >= 0) & (kept < len(columns))]]
    return named


def _near_ties(
    columns: Ints,
    scores: np.ndarray,
    kept: Columns,
    vision: set[int],
    near_tie: float,
    by_threshold: bool,
) -> Columns:
    """Columns whose score lies within ``near_tie`` of the worst that was kept, or of 1."""
    of = {c: float(s) for c, s in zip(columns.tolist(), scores, strict=True) if c in vision}
    best = [score for column, score in of.items() if column in kept]
    boundaries = [*([min(best)] if best else []), *([1.0] if by_threshold else [])]
    return frozenset(
        column
        for column, score in of.items()
        if any(abs(score - boundary) <= near_tie * abs(boundary) for boundary in boundaries)
    )


def keep_set_gates(rows: Sequence[Row], bars: Bars, layers: Sequence[int]) -> list[Gate]:
    """Counts must agree exactly, members by mean overlap."""
    if not rows:
        return []
    gates = [_count_gate(rows, layers)]
    for cut in sorted({row.cut for row in rows}):
        here = [row for row in rows if row.cut == cut]
        raw = float(np.mean([row.overlap for row in here]))
        margins = [row.margin for row in here if np.isfinite(row.margin)]
        margin = f", least margin {min(margins):.3g}" if margins else ""
        measured = float(np.mean([row.excused_overlap for row in here]))
        counted = f"; {raw:.4f} if near ties count" if raw != measured else ""
        detail = f"before layer {layers[cut]}{margin}{counted}"
        gates.append(at_least(f"keep_sets.cut.{cut}", measured, bars.overlap, detail))
    return gates


def _count_gate(rows: Sequence[Row], layers: Sequence[int]) -> Gate:
    wrong = [row for row in rows if row.is_of_unlike_count]
    detail = ""
    if wrong:
        first = wrong[0]
        ours, theirs = (len(side) for side in first.vision)
        dropped = len(first.others[1] - first.others[0])
        detail = (
            f"the cut before layer {layers[first.cut]} keeps {ours} vision tokens, not {theirs}, "
            f"and lacks {dropped} text columns (row {first.row} of {first.case})"
        )
    return at_most("keep_sets.counts", len(wrong), 0, detail)


def tie_gate(case: Case, kept: Sequence[Ints], layers: Sequence[int]) -> Gate:
    """With every score NaN the lowest columns survive: exactly those."""
    wrong = [differing(mine, theirs) for mine, theirs in zip(kept, case.ties, strict=True)]
    bad = [cut for cut, count in enumerate(wrong) if count]
    where = f"the cut before layer {layers[bad[0]]}" if bad else ""
    detail = f"{where} does not give equal scores to the lower column" if bad else ""
    return at_most("keep_sets.ties", sum(wrong), 0, detail)


def score_gates(played: Sequence[Played], bars: Bars, layers: Sequence[int]) -> list[Gate]:
    """What each cut ranks by, on the reference's keep-sets; only where rounding leaves it alone."""
    if bars.score is None:
        return []
    gates = []
    for cut, layer in enumerate(layers):
        errors = []
        for each in played:
            pair = each.scores[cut], each.case.scores[cut]
            if each.case.by_threshold:  # far above it, nobody asks how far
                pair = np.minimum(pair[0], CLEAR), np.minimum(pair[1], CLEAR)
            errors.append(_score_error(*pair))
        gates.append(at_most(f"scores.cut.{cut}", max(errors), bars.score, f"before layer {layer}"))
    return gates


def _score_error(mine: Array, theirs: Array) -> float:
    """The largest difference beside the best score of its row."""
    if mine.shape != theirs.shape:
        return np.inf
    best = theirs.max(-1, keepdims=True, initial=0)
    scale = np.where(best > 0, best, 1)
    return float(np.max(np.abs(mine - theirs) / scale, initial=0))
