"""Recycled tokens from schedule to artifact: what is told, counted, refused and forced."""

from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from cut_oracle import Array, Call, calls
from decoder_oracle import PAD_SCORE, Decoded, Rows, drawn
from graph_texts import Session, swept, untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from recycle_oracle import CLEAR, clustered
from recycling_decoder import Recycling
from test_insert_cuts import GATE, before, cut, resolved

from vtr_export.cost import cut_flops
from vtr_export.errors import ScheduleError
from vtr_export.families import read_facts
from vtr_export.passes.force_keep_sets import ForceKeepSets
from vtr_export.reference.recycling import peaks, raters_of
from vtr_export.schedule import Schedule
from vtr_export.schedule_document import Recycle
from vtr_export.steps import Shape

LLAVA = Shape(32, 576)
RECYCLE = {"by": "recycle"}


def schedule(**prefill: Any) -> Schedule:
    stages = ({"before_layer": 2, "keep": "50%"}, {"before_layer": 5, "keep": "25%"})
    return Schedule.from_data({"version": 1, "prefill": {"stages": stages} | prefill})


# --- counts ---


def test_clusters_enter_layers_and_are_candidates_of_the_next_cut() -> None:
    """288 dropped: 87 in 9 clusters; 297 - 144 = 153 dropped: 46 in 5."""
    found = schedule(merge=RECYCLE).resolve(LLAVA)
    assert found.keep_per_layer(576) == (576,) * 2 + (297,) * 3 + (149,) * 27
    assert found.behind_cuts(0) == (0, 0)
    whole = schedule(merge=RECYCLE, stages=({"before_layer": 2, "keep": "100%"},))
    assert whole.resolve(LLAVA).keep_per_layer(576) == (576,) * 32


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_a_row_of_fewer_tokens_has_no_more_clusters(few: int, more: int) -> None:
    """So that the widest row's are enough for all."""
    few, more = min(few, more), max(few, more)
    for merge in (Recycle(), Recycle(share=Fraction(1), each=1)):
        pairs = zip(merge.of(few), merge.of(more), strict=True)
        assert all(less <= most for less, most in pairs)


# --- what does not go together ---


@pytest.mark.parametrize(
    ("prefill", "shape", "reason", "line"),
    [
        ({"merge": RECYCLE}, Shape(32, None), "tokens per image vary", "prefill.merge"),
        ({"merge": RECYCLE | {"share": 9}}, LLAVA, "share is 9", "prefill.merge.share"),
        ({"merge": RECYCLE, "rank": "per_image"}, LLAVA, "with this rank", "prefill.rank"),
        ({"merge": RECYCLE, "drop_point": "inside"}, LLAVA, "this drop_point", "drop_point"),
        ({"score": {"query": "raters"}, "protect": "keys"}, LLAVA, "raters is", "prefill.protect"),
    ],
)
def test_what_no_definition_covers_is_refused(
    prefill: Any, shape: Shape, reason: str, line: str
) -> None:
    with pytest.raises(ScheduleError, match=reason) as caught:
        schedule(**prefill).resolve(shape)
    assert line in caught.value.where
    assert caught.value.hint


# --- the reference, against the oracle of the operators ---


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 5))
def test_the_references_clusters_are_those_of_the_definition(
    seed: int, count: int, clusters: int
) -> None:
    clusters = min(clusters, count)
    rows = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    expected = clustered(rows, clusters)
    found, _ = peaks(torch.tensor(rows), clusters)
    if expected.margin > CLEAR:
        assert [centre for centre, _ in found] == expected.centres
        members = [[i for i, c in enumerate(expected.label) if c == n] for n in range(clusters)]
        assert [mine for _, mine in found] == members


def test_raters_of_a_prompt_are_not_those_of_a_draft() -> None:
    """Text behind the image alone; here its first word is like the image, its draft even more."""
    image, word, other = torch.eye(3)
    embeds = torch.stack([word, image, image, image + other, other, 9 * image])[None]
    mask, vision = torch.ones(1, 6, dtype=torch.int64), torch.tensor([[1, 2]])
    assert raters_of(embeds, mask, vision).nonzero().tolist() == [[0, 5]]
    assert raters_of(embeds, mask, vision, 1).nonzero().tolist() == [[0, 3]]


# --- forced ---


class AsTold(Recycling):
    """Ranks by numbers of no meaning; ``sets`` are what came of it."""

    drawn: Callable[[tuple[int, ...]], Array]

    def decode(self) -> Decoded:
        self.sets: list[tuple[Array, Array, Array]] = []
        return super().decode()

    def _choose(self, *args: Any) -> tuple[Array, Array]:
        kept = super()._choose(*args)
        score, keep, budgets = self.decided
        self.decided = np.where(score == PAD_SCORE, score, self.drawn(score.shape)), keep, budgets
        return kept

    def _recycle(self, rows: Rows, merge: Recycle) -> tuple[Array, tuple[Array, Array]]:
        hidden, kept = super()._recycle(rows, merge)
        labels = np.array(self.labels, np.int64).reshape(rows.call.vision.shape)
        self.sets.append((*kept, labels))
        return hidden, kept


@cache
def forced() -> Session:
    model = cut(before("recycled"), resolved("recycled"))
    assert ForceKeepSets()(model).modified
    untouched(ForceKeepSets(), model)
    swept(model)
    return Session(model)


@settings(max_examples=30)
@given(calls(), st.integers(0, 2**32))
def test_a_decoder_recycles_what_it_is_told(call: Call, seed: int) -> None:
    session, rng = forced(), np.random.default_rng(seed)
    feeds = drawn(session.inputs, call, seed)
    told = AsTold(resolved("recycled"), feeds, call)
    told.drawn = rng.random
    expected = told.decode().outputs
    for number, sets in enumerate(told.sets):
        names = (f"kept.{number}", f"kept_vision.{number}", f"kept_label.{number}")
        feeds |= dict(zip(names, sets, strict=True))
    actual = session(feeds)
    assert {name for name in expected if not name.startswith("kept")} == actual.keys()
    for name, array in actual.items():
        np.testing.assert_allclose(array, expected[name], rtol=GATE, atol=GATE)


# --- costs ---


def test_what_recycling_costs_beside_the_score() -> None:
    """One cut of 576 tokens to 288 with 64 of text: 87 recycled tokens, 9 clusters."""
    facts = read_facts({"model_type": "llava"}, "config.json")
    one = {"stages": ({"before_layer": 2, "keep": "50%"},)}
    costs = {
        name: cut_flops(facts, schedule(**one, **said).resolve(facts), 576, 64)[0]
        for name, said in {
            "last": {},
            "text": {"score": {"query": "text"}},
            "raters": {"score": {"query": "raters"}},
            "recycle": {"merge": RECYCLE},
        }.items()
    }
    assert costs["raters"] - costs["text"] == 2 * 576 * 64 * 4096
    assert costs["recycle"] - costs["last"] == 2 * 4096 * (87 * 87 + 9 * 576)
