"""MustDrop's cuts of the small decoder of ``graphs/insert_cuts``, in numpy and from its definition."""

from typing import Any

import numpy as np
from cut_oracle import Array, Call, above, asked, ranked, selected
from decoder_oracle import Oracle, take

from vtr_export import ops
from vtr_export.schedule import Cut


class Filtering(Oracle):
    """How many tokens a row keeps follows from what its text gives them, at most what is said."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.marks = np.zeros_like(self.call.current)
        if "protected" in self.feeds:
            for b, row in enumerate(self.call.vision):
                self.marks[b, row] = self.feeds["protected"][b]

    def _choose(
        self, cut: Cut, query: Array, keys: Array, call: Call, groups: Array
    ) -> tuple[Array, Array]:
        """Surviving columns, and where the vision tokens stand among them."""
        schedule, threshold = self.schedule, self.schedule.threshold
        assert threshold is not None
        choice = ops.Choice(schedule.query, schedule.heads, softcap=self.softcap)
        rows = asked(call, query, keys, query.shape[-1] ** -0.5, choice, groups)
        safe = np.take_along_axis(self.marks, call.vision, 1) == 1
        score, nearest = above(call, rows, threshold.whole, threshold.single, safe)
        self.found.margin = min(self.found.margin, nearest)
        counts = [
            min(int((own >= 1).sum()), cut.keep.of(int(count)))
            for own, count in zip(score, self.call.counts, strict=True)
        ]
        kept = selected(call, [ranked(*each) for each in self._clear(score, counts)])
        self.marks = take(self.marks, kept[0])
        return kept

    def _clear(self, score: Array, counts: list[int]) -> list[tuple[Array, int, int]]:
        """What ranks each row; the margin also says where the bound decides."""
        for own, count in zip(score, counts, strict=True):
            order = np.sort(own)[::-1]
            if 0 < count < len(order) and order[count] >= 1:
                self.found.margin = min(self.found.margin, float(order[count - 1] - order[count]))
        return [(own, max(counts), count) for own, count in zip(score, counts, strict=True)]
