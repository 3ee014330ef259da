"""The small decoder of ``graphs/insert_cuts`` under SparseVLM's words, in numpy."""

from typing import Any

import numpy as np
from cut_oracle import Array, Call, ranked, scored, selected
from decoder_oracle import Decoded, Oracle, Rows, margin_of, take
from recycle_oracle import counts, merged, placed, raters, recycled

from vtr_export import ops
from vtr_export.schedule import Cut, Resolved
from vtr_export.schedule_document import Recycle


def says_so(schedule: Resolved) -> bool:
    """Whether ``schedule`` needs :class:`Recycling`."""
    return schedule.query == "raters" or isinstance(schedule.merge, Recycle)


class Recycling(Oracle):
    """Raters rank, or dropped tokens become means of clusters, or both; all images together."""

    def decode(self) -> Decoded:
        """Who rates is found once, from what enters."""
        self.raters: Array | None = None
        if self.schedule.query == "raters":
            self.raters, self.found.margin = raters(self.call, self.feeds["inputs_embeds"])
        return super().decode()

    def _choose(
        self, cut: Cut, query: Array, keys: Array, call: Call, groups: Array
    ) -> tuple[Array, Array]:
        choice = ops.Choice(self.schedule.query, self.schedule.heads, softcap=self.softcap)
        scale = query.shape[-1] ** -0.5
        score = scored(call, query, keys, scale, choice, groups, self.raters)
        keep = cut.keep.of(self.call.vision.shape[1])
        budgets = [cut.keep.of(int(count)) for count in self.call.counts]
        for row, budget in zip(score, budgets, strict=True):
            self.found.margin = min(self.found.margin, margin_of(row, budget))
        self.decided = score, keep, budgets
        chosen = [ranked(row, keep, budget) for row, budget in zip(score, budgets, strict=True)]
        return selected(call, chosen)

    def _narrow(self, rows: Rows, kept: tuple[Array, Array]) -> Rows:
        """What is recycled follows from the rows that enter the next layer."""
        merge = self.schedule.merge
        if not isinstance(merge, Recycle):
            after = super()._narrow(rows, kept)
        else:
            hidden, kept = self._recycle(rows, merge)
            after = self._behind(rows, hidden, kept)
        if self.raters is not None:
            self.raters = take(self.raters, kept[0])
        return after

    def _recycle(self, rows: Rows, merge: Recycle) -> tuple[Array, tuple[Array, Array]]:
        """Hidden states behind the cut; their columns, and where vision tokens stand."""
        (score, keep, budgets), call = self.decided, rows.call
        most = counts(merge, call.vision.shape[1] - keep)[1]
        hidden, columns, places, self.labels = [], [], [], list[list[int]]()
        for b, own in enumerate(rows.hidden):
            made = recycled(score[b], own[call.vision[b]], keep, budgets[b], merge)
            self.found.margin = min(self.found.margin, made.margin)
            row, place = placed(call, b, made, most)
            columns.append(row)
            places.append(place)
            hidden.append(merged(call, b, own, made, row, most))
            short = most - len(made.centres)
            self.labels.append([-1 if n < 0 else n + short for n in made.label])
        vision = np.array(places, np.int64).reshape(len(columns), -1)
        return np.array(hidden), (np.array(columns), vision)

    def _behind(self, rows: Rows, hidden: Array, kept: tuple[Array, Array]) -> Rows:
        self.stage += 1
        columns, vision = kept
        call = Call(self._past(self.stage), take(rows.call.current, columns), vision)
        positions: Any = take(rows.positions, columns)
        if self.schedule.positions == "repacked":
            counted = np.maximum(np.cumsum(call.padding, 1) - 1, 0)
            positions = counted[:, call.past.shape[1] :]
        number = self.stage - 1
        self.found.outputs |= {f"present_mask.{number}": call.padding, f"kept.{number}": columns}
        return Rows(hidden, positions, call, take(rows.groups, columns))
