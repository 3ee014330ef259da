"""SparseVLM's raters and recycled tokens in ONNX Runtime, against numpy and what must hold."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from cut_oracle import Array, Call, calls, scored, visible
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from recycle_oracle import CLEAR, clustered, counts, merged, placed, raters, recycled
from test_ops import Heads, attention, run

from vtr_export import ops
from vtr_export.schedule_document import Recycle

MERGES = st.builds(
    Recycle,
    share=st.sampled_from([Fraction(3, 10), Fraction(1, 2), Fraction(1)]),
    each=st.integers(1, 4),
)
SEEDS = st.integers(0, 2**32)


def told(merge: Recycle) -> dict[str, Any]:
    """Its numbers."""
    share = Fraction(merge.share)
    named = {"top": share.numerator, "bottom": share.denominator, "size": merge.each}
    return {name: np.array(value) for name, value in named.items()}


# --- counts ---


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=5), MERGES)
def test_counts_are_those_of_the_paper_and_never_more_than_there_are(
    dropped: list[int], merge: Recycle
) -> None:
    found = run("VtrClusterCount", dropped=np.array(dropped), **told(merge))
    for some, recycled_tokens, clusters in zip(dropped, *map(list, found), strict=True):
        assert (recycled_tokens, clusters) == counts(merge, some)
        assert 0 <= clusters <= recycled_tokens <= some
        assert (clusters > 0) == (some > 0)


def test_what_sparsevlm_publishes() -> None:
    """276 tokens dropped of 576: 83 of them in 9 clusters (methods.md, 3.4: 206.5 on average)."""
    assert counts(Recycle(), 276) == (83, 9)
    per_layer, tokens = [576] * 3, 576
    for keep, layers in ((300, 4), (200, 9), (110, 16)):
        tokens = keep + counts(Recycle(), tokens - keep)[1]
        per_layer += [tokens] * layers
    assert np.mean(per_layer) == 206.5


# --- clusters ---


def rows_of(seed: int, batch: int, count: int, width: int = 4) -> Array:
    return np.random.default_rng(seed).normal(size=(batch, count, width)).astype(np.float32)


@given(SEEDS, st.lists(st.integers(0, 7), min_size=1, max_size=3), MERGES)
def test_clusters_are_the_peaks_of_density_and_who_is_nearest(
    seed: int, recycled_tokens: list[int], merge: Recycle
) -> None:
    widest = max(recycled_tokens)
    clusters = [min(n, n // merge.each + 1) for n in recycled_tokens]
    rows = rows_of(seed, len(clusters), widest)
    centre, label = run(
        "VtrClusters",
        recycled=np.array(recycled_tokens),
        clusters=np.array(clusters),
        most=np.array([max(clusters)]),
        hidden=rows,
    )
    for b, (count, own) in enumerate(zip(recycled_tokens, clusters, strict=True)):
        expected = clustered(rows[b, :count], own)
        assume(expected.margin > CLEAR)
        assert centre[b].tolist() == expected.centres + [widest] * (max(clusters) - own)
        assert label[b].tolist() == expected.label + [-1] * (widest - count)


@given(SEEDS, st.integers(1, 8), st.integers(1, 4), st.permutations(range(8)))
def test_clusters_are_the_same_whatever_the_order(
    seed: int, count: int, clusters: int, order: list[int]
) -> None:
    """Where none are equally dense: two that are each other's nearest are, in pairs."""
    clusters, rows = min(clusters, count), rows_of(seed, 1, count)
    turn = [i for i in order if i < count]
    defined = clustered(rows[0], clusters)
    assume(defined.margin > CLEAR and not defined.is_tied)

    def groups(given: Array, names: list[int]) -> set[frozenset[int]]:
        sizes = {"recycled": [count], "clusters": [clusters], "most": [clusters]}
        feeds: dict[str, Any] = {name: np.array(value) for name, value in sizes.items()}
        label = run("VtrClusters", hidden=given, **feeds)[1][0]
        return {
            frozenset(n for n, mine in zip(names, label, strict=True) if mine == c)
            for c in range(clusters)
        }

    assert groups(rows, list(range(count))) == groups(rows[:, turn], turn)


@pytest.mark.parametrize("value", [1.0, np.nan, np.inf])
def test_ties_go_to_the_lower_index_and_every_centre_is_its_own(value: float) -> None:
    """Tokens that are all alike, and those that are no numbers."""
    feeds: dict[str, Any] = {
        "recycled": np.array([6]),
        "clusters": np.array([3]),
        "most": np.array([3]),
    }
    centre, label = run("VtrClusters", hidden=np.full((1, 6, 4), value, np.float32), **feeds)
    assert centre.tolist() == [[0, 1, 2]]
    assert label.tolist() == [[0, 1, 2, 0, 0, 0]]


def test_distances_of_tokens_that_share_a_large_part_are_exact_enough() -> None:
    rows = rows_of(0, 1, 40, 64)
    (squared,) = run("VtrDistances", hidden=rows + np.float32(500))
    apart = (rows + np.float32(500)).astype(float)
    expected = ((apart[0, :, None] - apart[0, None]) ** 2).mean(-1)
    np.testing.assert_allclose(squared[0], expected, rtol=1e-4, atol=1e-5)
    assert (np.diagonal(squared[0]) == 0).all()


# --- the cut ---


def budgets(call: Call, share: Fraction) -> tuple[int, list[int]]:
    return int(call.sizes[3] * share), [int(int(v) * share) for v in call.counts]


@settings(max_examples=150)
@given(calls(st.integers(0, 9)), MERGES, st.integers(0, 4), SEEDS)
def test_recycling_keeps_the_best_and_appends_the_means_of_the_next_best(
    call: Call, merge: Recycle, quarters: int, seed: int
) -> None:
    batch, _, length, tokens = call.sizes
    whole = [c % 4 for c in (*call.counts, tokens)]
    assume(not any(whole))  # images of four tokens
    keep, budget = budgets(call, Fraction(quarters, 4))
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, length, 3)).astype(np.float32)
    score = rng.random((batch, tokens)).astype(np.float32)
    score[np.take_along_axis(call.current, call.vision, 1) == 0] = -2
    most = counts(merge, tokens - keep)[1]
    rows = [
        recycled(score[b], hidden[b, call.vision[b]], keep, budget[b], merge) for b in range(batch)
    ]
    assume(min(row.margin for row in rows) > CLEAR)
    feeds: dict[str, Any] = {
        "vision_index": call.vision,
        "keep": np.array([keep]),
        "hidden": hidden,
    }
    indices, places, label = run(
        "VtrRecycle", score=score, budget=np.array(budget), **feeds, **told(merge)
    )
    (kept,) = run("VtrMerge", label=label, indices=indices, kept_vision_index=places, **feeds)
    for b, row in enumerate(rows):
        columns, wanted = placed(call, b, row, most)
        assert indices[b].tolist() == columns
        assert places[b].tolist() == wanted
        short = most - len(row.centres)
        assert label[b].tolist() == [-1 if n < 0 else n + short for n in row.label]
        np.testing.assert_allclose(
            kept[b], merged(call, b, hidden[b], row, columns, most), atol=1e-5
        )


@given(SEEDS, st.integers(1, 12), st.integers(0, 3))
def test_means_weighted_by_their_sizes_conserve_the_sum_of_what_is_recycled(
    seed: int, tokens: int, keep: int
) -> None:
    keep, merge = min(keep, tokens), Recycle(share=Fraction(1), each=3)
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(1, tokens + 2, 5)).astype(np.float32)
    feeds: dict[str, Any] = {
        "vision_index": np.arange(1, tokens + 1)[None],
        "keep": np.array([keep]),
        "hidden": hidden,
    }
    score = rng.random((1, tokens)).astype(np.float32)
    indices, places, label = run(
        "VtrRecycle", score=score, budget=np.array([keep]), **feeds, **told(merge)
    )
    (kept,) = run("VtrMerge", label=label, indices=indices, kept_vision_index=places, **feeds)
    sizes = np.bincount(label[0][label[0] >= 0], minlength=places.shape[1] - keep)
    assert sizes.sum() == tokens - keep
    means = kept[0, places[0, keep:]]
    gone = hidden[0, 1 + np.flatnonzero(label[0] >= 0)]
    np.testing.assert_allclose((means * sizes[:, None]).sum(0), gone.sum(0), atol=1e-4)
    assert kept[0, 0].tolist() == hidden[0, 0].tolist()
    assert kept[0, -1].tolist() == hidden[0, -1].tolist()


# --- raters ---


@given(calls(), SEEDS)
def test_raters_are_text_that_the_image_attends_to_above_the_mean(call: Call, seed: int) -> None:
    batch, _, length, tokens = call.sizes
    embeds = np.random.default_rng(seed).normal(size=(batch, length, 3)).astype(np.float32)
    (weight,) = run("VtrRaters", hidden=embeds, padding=call.padding, vision_index=call.vision)
    expected, margin = raters(call, embeds)
    assume(margin > CLEAR)
    assert weight.dtype == np.float32
    if tokens:
        np.testing.assert_allclose(weight, expected, atol=1e-6)
        np.testing.assert_allclose(weight.sum(1), 1, atol=1e-6)
    else:
        assert not weight.any()


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_where_nobody_rates_above_the_mean_the_last_row_asks(value: float) -> None:
    feeds: dict[str, Any] = {
        "padding": np.ones((1, 6), np.int64),
        "vision_index": np.array([[1, 2]]),
    }
    (weight,) = run("VtrRaters", hidden=np.full((1, 6, 2), value, np.float32), **feeds)
    assert weight.tolist() == [[0, 0, 0, 0, 0, 1]]


@given(calls(), st.sampled_from(["mean", "max"]), SEEDS)
def test_a_raters_score_is_their_mean_of_what_text_rows_give(
    call: Call, heads: Any, seed: int
) -> None:
    """One rater gives what it gives alone; all text rows give what ``query: text`` does."""
    query, keys, scale = attention(call, Heads(1, 2, 4), seed, "f4")
    mask = visible(call.padding, call.current.shape[1])
    feeds: dict[str, Any] = {
        "query": query,
        "keys": keys,
        "mask": mask,
        "vision_index": call.vision,
    }
    last = np.zeros(call.current.shape, np.float32)
    last[:, -1] = 1
    for asked, weight in (("last", last), ("text", texts(call))):
        choice = ops.Choice("raters", heads)
        (score,) = run(
            "VtrRaterScore", choice, **feeds, raters=weight, hidden=call.hidden(), scale=scale
        )
        wanted: Any = ops.Choice(asked, heads)  # type: ignore[arg-type]  # one of two words
        np.testing.assert_allclose(score, scored(call, query, keys, scale, wanted), atol=2e-6)


def texts(call: Call) -> Array:
    """Equal weights for all text behind the last vision token."""
    weight = np.zeros(call.current.shape, np.float32)
    for b, real in enumerate(call.current):
        seen = [int(c) for c in call.vision[b] if real[c]]
        weight[b, max(seen, default=-1) + 1 :] = real[max(seen, default=-1) + 1 :]
    shared: Array = weight / weight.sum(1, keepdims=True)
    return shared
