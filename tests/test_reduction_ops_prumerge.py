"""PruMerge's parts against numpy: outliers, orders, sums over nearest keys and over the rest."""

from collections.abc import Sequence

import numpy as np
import pytest
from cut_oracle import Array
from hypothesis import assume, given
from hypothesis import strategies as st
from test_ops import run

SEED = st.integers(0, 2**32 - 1)
LEVELS = st.lists(st.integers(-2, 2), min_size=1, max_size=24)


def falling(score: Sequence[float]) -> list[int]:
    """Best first; of equal ones the first."""
    return sorted(range(len(score)), key=lambda i: (-score[i], i))


def bound_of(row: Array) -> float:
    low, high = np.percentile(row.astype(float), [25, 75])
    return float(high + 1.5 * (high - low))


def nearest_sums(
    stream: Array, keys: Array, weight: Array, source: Sequence[int], nearest: int
) -> Array:
    """One token after the other, in double precision."""
    unit = keys / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    rows = []
    for token in source:
        likeness = unit @ unit[token]
        others = [i for i in falling(likeness) if i != token][:nearest]
        rows.append(stream[token] + sum((weight[i] * stream[i] for i in others), np.zeros(1)))
    return np.array(rows).reshape(len(source), stream.shape[1])


# --- outliers ---


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=40), st.integers(0, 3))
def test_outliers_lie_beyond_the_upper_quartile_by_half_again_the_range(
    levels: list[int], images: int
) -> None:
    score = np.array(levels, np.float32)  # quarters of these, and their sums, are exact
    (count,) = run("VtrOutliers", score=np.tile(score, (images, 1)))
    expected = int((score > bound_of(score)).sum())
    assert count.tolist() == [expected] * images
    assert expected <= len(levels) // 4


@given(SEED, st.integers(1, 60))
def test_outliers_of_one_image_are_nothing_to_another(seed: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    score = (rng.pareto(1.5, (3, tokens))).astype(np.float32)
    margins = [np.abs(row - bound_of(row)).min() / (1 + np.abs(row).max()) for row in score]
    assume(min(margins) > 1e-5)
    (count,) = run("VtrOutliers", score=score)
    assert count.tolist() == [int((row > bound_of(row)).sum()) for row in score]
    assert run("VtrOutliers", score=rng.permuted(score, axis=1))[0].tolist() == count.tolist()
    assert run("VtrOutliers", score=score * 4)[0].tolist() == count.tolist()


# --- orders ---


@given(LEVELS, st.data())
def test_the_best_come_best_first_and_then_the_others_named(
    levels: list[int], data: st.DataObject
) -> None:
    keep = data.draw(st.integers(0, len(levels)))
    also = data.draw(st.lists(st.integers(0, len(levels) - 1), max_size=5))
    score = np.array([levels, levels[::-1]], np.float32)
    (source,) = run("VtrTopOrder", score=score, keep=np.array([keep]))
    assert source.tolist() == [falling(row)[:keep] for row in score.tolist()]
    (both,) = run("VtrAlso", source=source, tokens=np.array(also, np.int64))
    assert both.tolist() == [falling(row)[:keep] + also for row in score.tolist()]


@given(LEVELS, st.data())
def test_every_step_another_token_joins_the_best_and_the_last_never(
    levels: list[int], data: st.DataObject
) -> None:
    tokens = len(levels)
    score = np.array([levels, levels[::-1]], np.float32)
    best = np.array([data.draw(st.integers(0, tokens)) for _ in score])
    step = np.array([data.draw(st.integers(1, tokens + 1)) for _ in score])
    source, counts = run("VtrSpread", score=score, best=best, step=step)
    for row, k, s, found, count in zip(score.tolist(), best, step, source, counts, strict=True):
        chosen = falling(row)[:k]
        chosen += [i for i in range(0, tokens - 1, s) if i not in chosen]
        assert found[:count].tolist() == chosen
        assert sorted(found) == list(range(tokens))


# --- sums ---


@given(
    st.integers(0, 2),
    st.integers(1, 12),
    st.integers(0, 6),
    st.sampled_from(["f4", "f2"]),
    SEED,
    st.data(),
)
def test_a_kept_token_takes_what_its_nearest_others_weigh(
    images: int, tokens: int, kept: int, dtype: str, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    stream = rng.normal(size=(images, tokens, 3)).astype(dtype)
    keys = rng.normal(size=(images, tokens, 4)).astype(dtype)
    weight = rng.random((images, tokens), np.float32)
    source = rng.integers(0, tokens, (images, kept))
    nearest = data.draw(st.integers(0, tokens - 1))
    unit = keys / np.linalg.norm(keys.astype(float), axis=-1, keepdims=True)
    assume((np.diff(np.sort(unit @ unit.swapaxes(1, 2))) > 1e-6).all())  # ties are another test's
    (merged,) = run(
        "VtrNearestSum",
        stream=stream,
        keys=keys,
        weight=weight,
        source=source,
        nearest=np.array([nearest]),
    )
    assert merged.dtype == np.dtype(dtype)
    for at in range(images):
        wanted = nearest_sums(
            stream[at].astype(float), keys[at].astype(float), weight[at], source[at], nearest
        )
        np.testing.assert_allclose(merged[at], wanted, atol=1e-5 if dtype == "f4" else 2e-2)


def test_of_equally_near_tokens_the_first_are_taken_and_never_itself() -> None:
    tokens = 40
    stream = np.eye(tokens, dtype=np.float32)[None]
    keys = np.ones((1, tokens, 4), np.float32)
    weight = np.full((1, tokens), 0.5, np.float32)
    feeds = {"source": np.array([[0, 7, 39]]), "nearest": np.array([32])}
    (merged,) = run("VtrNearestSum", stream=stream, keys=keys, weight=weight, **feeds)
    for row, token in zip(merged[0], (0, 7, 39), strict=True):
        near = [i for i in range(tokens) if i != token][:32]
        assert row.tolist() == [1 if i == token else 0.5 * (i in near) for i in range(tokens)]


@given(st.integers(0, 3), st.integers(1, 9), st.integers(0, 6), SEED)
def test_the_rest_weighs_what_no_token_stands_for(
    images: int, tokens: int, slots: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    stream = rng.normal(size=(images, tokens, 3)).astype(np.float32)
    weight = rng.random((images, tokens), np.float32)
    source = rng.integers(0, tokens, (images, slots))
    counts = rng.integers(0, slots + 1, images)
    feeds = {"stream": stream, "weight": weight}
    (rest,) = run("VtrRestSum", source=source, counts=counts, **feeds)
    for at in range(images):
        left = [i for i in range(tokens) if i not in source[at, : counts[at]]]
        wanted = sum((weight[at, i] * stream[at, i] for i in left), np.zeros(3))
        np.testing.assert_allclose(rest[at, 0], wanted, atol=1e-5)
    (all_kept,) = run(
        "VtrRestSum",
        source=np.tile(np.arange(tokens), (images, 1)),
        counts=np.full(images, tokens),
        **feeds,
    )
    assert not all_kept.any()


@pytest.mark.parametrize("counts", [[0, 3], [1, 2], [3]])
def test_a_row_is_put_behind_each_images_last(counts: list[int]) -> None:
    stream = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    row = np.array([[[-1, -2]], [[-3, -4]]], np.float32)
    source = np.array([[5, 6, 7], [8, 9, 8]])
    (longer,) = run("VtrAppend", stream=stream, row=row, counts=np.array(counts))
    (marked,) = run("VtrSources", source=source, counts=np.array(counts))
    for at, count in enumerate(counts * (2 // len(counts))):
        wanted = [*stream[at, :count].tolist(), row[at, 0].tolist()]
        assert longer[at, : count + 1].tolist() == wanted
        assert marked[at].tolist() == [*source[at, :count], *[-1] * (4 - count)]


@given(st.integers(0, 2), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), SEED)
def test_heads_side_by_side_are_the_projections_whole_width(
    images: int, heads: int, rows: int, width: int, seed: int
) -> None:
    projected = np.random.default_rng(seed).normal(size=(images, rows, heads * width))
    by_head = projected.reshape(images, rows, heads, width).transpose(0, 2, 1, 3)
    (whole,) = run("VtrWholeWidth", stream=np.ascontiguousarray(by_head, np.float32))
    assert (whole == projected[:, None].astype(np.float32)).all()
