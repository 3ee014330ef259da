"""MustDrop in the prefill: traced graphs against the reference, where each row keeps its own number."""

import random
from typing import Any

import pytest
import torch
from cut_graphs import Client, Traced, Tracer
from test_parity import CLEAR, Turn, check_rows, compare, feeds, pair, turn, words
from torch import Tensor

from vtr_export.reference import Reference, positions_of
from vtr_export.schedule import Resolved
from vtr_export.schedule_document import Threshold

BOUND = 12  # of the 16 tokens of an image
TEXT: dict[str, Any] = {"query": "text"}
SOME = Threshold(whole=0.06, single=0.04)  # of 16 tokens: the random model gives each about that
CASES: dict[str, dict[str, Any]] = {
    "text": {**TEXT, "threshold": SOME, "positions": "repacked"},
    "next": {**TEXT, "threshold": SOME, "source": "next"},
    "inside_last": {"threshold": SOME, "drop_point": "inside", "heads": "max"},
    "protected": {**TEXT, "threshold": SOME, "positions": "repacked", "protect": True},
    "nothing": {**TEXT, "threshold": Threshold(whole=1, single=1)},
    "top_k_protected": {"protect": True},
}


class Pair:
    """A graph and its reference, given the same calls."""

    def __init__(self, tiny: Traced, cuts: dict[int, int], **options: Any) -> None:
        schedule = tiny.schedule(cuts, **options)
        self.reference = Reference(tiny.model.model.language_model, tiny.model.lm_head, schedule)
        self.client = Client(tiny.cut(schedule))
        self.cache: Any = None

    def __call__(self, turn: Turn, seen: Tensor, protected: Tensor) -> Any:
        embeds, _, vision = turn
        positions = positions_of(seen)[:, -embeds.shape[1] :]
        step = self.reference(embeds, seen, positions, vision, self.cache, protected=protected)
        fed = feeds(embeds, seen, positions, vision) | {"protected": protected.numpy()}
        outputs = self.client(**fed)
        assert min((float(m.min()) for m in step.margins), default=1.0) > CLEAR
        compare(step, outputs)
        self.cache = step.cache
        return step


def converse(both: Pair, tiny: Traced, seed: int) -> list[Any]:
    """Images and a question, an answer, an image more; which tokens are protected is drawn."""
    draw = torch.Generator().manual_seed(seed)
    turns = [turn(tiny, [1, 2, 0], draw), words(tiny, 3, 1, draw), words(tiny, 3, 1, draw)]
    turns += [turn(tiny, [1, 0, 1], draw), words(tiny, 3, 1, draw)]
    seen, steps = torch.zeros(3, 0, dtype=torch.int64), []
    for each in turns:
        seen = torch.cat((seen, each[1]), 1)
        vision = each[2]
        real = each[1].gather(1, vision)
        protected = (torch.rand(vision.shape, generator=draw) < 0.2).long() * real
        steps.append((each, protected, both(each, seen, protected)))
    return steps


@pytest.mark.parametrize("case", CASES)
def test_a_conversation_of_a_mixed_batch_equals_the_reference(case: str, traced: Tracer) -> None:
    tiny, options = traced("llama"), CASES[case]
    both = Pair(tiny, {1: BOUND, 3: BOUND}, **options)
    steps = converse(both, tiny, seed=4)
    (_, mask, vision), protected, first = steps[0]
    real = mask.gather(1, vision).bool()
    kept = (first.kept[0][:, :, None] == vision[:, None, :]).any(1) & real
    if options.get("protect"):
        assert kept[protected.bool()].all()
    if "threshold" in options:
        counts = kept.sum(1).tolist()
        assert counts[0] <= BOUND
        assert counts[1] < 2 * BOUND
        assert sum(counts) == 0 if case == "nothing" else min(counts[:2]) > 0


def test_a_row_keeps_what_it_keeps_alone(traced: Tracer) -> None:
    """However many tokens the widest row keeps, at every cut."""
    tiny, draw = traced("four_tokens"), random.Random(1)
    options: dict[str, Any] = {**TEXT, "threshold": Threshold(whole=0.25, single=0.2)}
    schedule = tiny.schedule({1: 4, 2: 4}, positions="repacked", **options)
    both, compared, widths = pair(tiny, schedule), 0, set()
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        counts = [draw.randint(0, 2) for _ in range(draw.randint(2, 3))]
        turns = [turn(tiny, counts, generator), words(tiny, len(counts), 1, generator)]
        compared += check_rows(both, turns)
        widths |= {tuple(row) for row in both.client.cache["past_mask.1"].sum(1)[:, None]}
    assert compared > 15
    assert len(widths) > 3


def test_the_keep_of_a_stage_is_the_most_that_stays(traced: Tracer) -> None:
    tiny = traced("llama")
    model = tiny.model
    draw = torch.Generator().manual_seed(3)
    embeds, mask, vision = turn(tiny, [1, 2], draw)
    kept = {}
    for keep in (16, 5):
        schedule = tiny.schedule({1: keep}, **TEXT, threshold=SOME)
        reference = Reference(model.model.language_model, model.lm_head, schedule)
        step = reference(embeds, mask, positions_of(mask), vision)
        real = mask.bool()
        kept[keep] = [
            set(row[own[row]].tolist()) for row, own in zip(step.kept[0], real, strict=True)
        ]
        assert Resolved.keep_per_layer(schedule, 16)[1] == keep
    text = [int(row.sum()) - 16 * images for row, images in zip(mask, (1, 2), strict=True)]
    assert all(few <= many for few, many in zip(kept[5], kept[16], strict=True))
    assert len(kept[5][0]) - text[0] == 5 < len(kept[16][0]) - text[0] < 16
