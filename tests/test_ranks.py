"""Rankings of layers beside pairs counted one by one, and beside transformers' own attention."""

import json
import math
from itertools import combinations
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import IMAGE, PAD, pictures, prompt, tiny_llava

from vtr_export.reference import embed, pad_batch
from vtr_export.search.candidate import Score
from vtr_export.search.ranks import Ranks, layer_scores, ranks

Row = list[float]


def counted_tau(one: Row, other: Row) -> float:
    """Tau-b from its definition: concordant less discordant pairs over the untied ones."""
    agree = untied_one = untied_other = 0
    for i, j in combinations(range(len(one)), 2):
        a, b = np.sign(one[i] - one[j]), np.sign(other[i] - other[j])
        agree += int(a * b)
        untied_one += int(a != 0)
        untied_other += int(b != 0)
    return agree / math.sqrt(untied_one * untied_other) if untied_one * untied_other else math.nan


def counted_overlap(one: Row, other: Row, keep: int) -> float:
    best = [sorted(range(len(row)), key=lambda i: (-row[i], i))[:keep] for row in (one, other)]
    return len(set(best[0]) & set(best[1])) / keep


few_values = st.integers(0, 5).map(float)  # so that tokens tie
questions = st.lists(
    st.integers(2, 12).flatmap(
        lambda v: st.lists(st.lists(few_values, min_size=v, max_size=v), min_size=3, max_size=3)
    ),
    min_size=1,
    max_size=4,
)


@given(scores=questions)
def test_tau_and_overlap_are_those_of_counted_pairs(scores: list[list[Row]]) -> None:
    found = ranks([np.array(each) for each in scores], Score(), shares=[0.5, 0.2])
    for one, other in combinations(range(3), 2):
        taus = [counted_tau(each[one], each[other]) for each in scores]
        known = [tau for tau in taus if not math.isnan(tau)]
        mean = sum(known) / len(known) if known else math.nan
        spread = math.sqrt(sum((t - mean) ** 2 for t in known) / len(known)) if known else math.nan
        np.testing.assert_allclose(found.tau[one, other], mean, atol=1e-12)
        np.testing.assert_allclose(found.spread[other, one], spread, atol=1e-7)
        for overlap in found.overlaps:
            shared = [
                counted_overlap(e[one], e[other], max(1, int(overlap.share * len(e[0]))))
                for e in scores
            ]
            np.testing.assert_allclose(overlap.mean[one, other], sum(shared) / len(shared))


def odd_first_layer() -> Ranks:
    """Layer 0 ranks backwards; layer 2 swaps one pair of layer 1's six."""
    return ranks([np.array([[4.0, 3, 2, 1], [1, 2, 3, 4], [1, 2, 4, 3]])], Score())


def test_the_first_layer_is_told_apart() -> None:
    found = odd_first_layer()
    assert found.first == pytest.approx(-5 / 6)  # of -1 and -4/6
    assert found.later == found.least == pytest.approx(4 / 6)
    head, *rows = found.table()
    assert [len(row) for row in rows] == [len(head)] * 2
    assert rows[0][:4] == ["0", "-1.00", "-0.83", "-1.00"]
    assert rows[1][:4] == ["1", "0.67", "0.67", "0.67"]
    assert rows[1][head.index("top 25 %: next")] == "0.00"
    assert rows[1][head.index("top 50 %: next")] == "1.00"


def test_a_layer_that_scores_all_alike_has_no_tau() -> None:
    found = ranks([np.array([[1.0, 1], [1, 2], [1, 3]])], Score())
    data = json.loads(found.dump())
    assert data["tau"] == [[1.0, None, None], [None, 1.0, 1.0], [None, 1.0, 1.0]]
    assert math.isnan(found.first)
    assert data["questions"] == 1


def test_a_question_without_a_tau_is_left_out() -> None:
    alike, swapped = np.array([[1.0, 1, 1], [1, 2, 3]]), np.array([[1.0, 2, 3], [1, 3, 2]])
    found = ranks([alike, swapped], Score())
    assert found.tau[0, 1] == pytest.approx(1 / 3)
    assert found.spread[0, 1] == pytest.approx(0)


@pytest.mark.parametrize("scores", [[], [np.ones((1, 5))], [np.ones((3, 1))]])
def test_nothing_to_compare_is_refused(scores: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="at least"):
        ranks(scores, Score())


@pytest.mark.parametrize("query", ["last", "text"])
@pytest.mark.parametrize("heads", ["mean", "max"])
@torch.no_grad()
def test_every_layer_is_scored_by_its_own_attention(
    query: Literal["last", "text"], heads: Literal["mean", "max"]
) -> None:
    """Beside the attention transformers returns; the rows differ in text and in images."""
    model = tiny_llava(layers=3)
    generator = torch.Generator().manual_seed(2)
    rows = [prompt(generator, 16, images) for images in (1, 2)]
    ids, mask = pad_batch(rows, PAD, IMAGE)
    pixels = pictures(model, 3, generator)
    said = model(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, output_attentions=True
    ).attentions
    embeds, vision = embed(model, ids, mask, pixels)
    score = Score("previous", query, heads)
    ours = layer_scores(model.model.language_model, model.lm_head, score, (embeds, mask, vision))
    for row, (columns, found) in enumerate(zip(ids == IMAGE, ours, strict=True)):
        last = int(columns.nonzero().max())
        asking = slice(last + 1, None) if query == "text" else slice(-1, None)
        for layer, attention in enumerate(said):
            by_head = attention[row][:, asking]
            merged = by_head.mean(0) if heads == "mean" else by_head.amax(0)
            expected = merged.mean(0)[columns]
            np.testing.assert_allclose(found[layer], expected.numpy(), atol=1e-6)
