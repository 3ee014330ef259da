"""Scores that a vision tower gives, and the best tokens by them, against numpy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cut_oracle import Array
from hypothesis import given
from hypothesis import strategies as st
from test_ops import run

SEED = st.integers(0, 2**32 - 1)


def drawn(shape: Sequence[int], seed: int, dtype: Any) -> tuple[Array, Array]:
    """Queries and keys [I,H,n,d] far enough apart that a softmax is not flat."""
    rng = np.random.default_rng(seed)
    query, key = (2 * rng.normal(size=shape).astype(dtype) for _ in range(2))
    return query, key


def attention(query: Array, key: Array, scale: float) -> Array:
    """[I,H,n,n] in double precision."""
    logits = np.einsum("ihqd,ihkd->ihqk", query.astype(float), key.astype(float)) * scale
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weight / weight.sum(-1, keepdims=True))


def topmost(score: Sequence[float], keep: int) -> list[int]:
    """Of equal ones the first."""
    return sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:keep])


@given(
    st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(2, 9), st.sampled_from([2, 4])),
    st.sampled_from(["f4", "f2"]),
    SEED,
)
def test_the_class_tokens_row_and_the_mean_row_of_an_attention(
    shape: tuple[int, ...], dtype: str, seed: int
) -> None:
    query, key = drawn(shape, seed, dtype)
    whole = attention(query, key, 0.5)
    (first,) = run("VtrClassAttention", query=query, key=key, scale=0.5)
    (mean,) = run("VtrReceivedAttention", query=query, key=key, scale=0.5)
    assert (first.dtype, mean.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(first, whole[:, :, 0, 1:], atol=2e-6)
    np.testing.assert_allclose(mean, whole.mean(2), atol=2e-6)
    np.testing.assert_allclose(mean.sum(-1), 1, atol=1e-5)  # what is given is received


@given(SEED, st.integers(3, 9))
def test_scores_go_with_their_tokens(seed: int, length: int) -> None:
    query, key = drawn((1, 2, length, 4), seed, "f4")
    order = np.random.default_rng(seed).permutation(length - 1) + 1
    moved = np.concatenate(([0], order))
    for name, at in (("VtrClassAttention", order - 1), ("VtrReceivedAttention", moved)):
        (before,) = run(name, query=query, key=key, scale=0.5)
        (after,) = run(name, query=query[:, :, moved], key=key[:, :, moved], scale=0.5)
        np.testing.assert_allclose(after, before[..., at], atol=2e-6)


@given(st.integers(0, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), SEED)
def test_a_tokens_score_is_the_mean_of_the_patches_it_covers(
    images: int, rows: int, columns: int, merge: int, seed: int
) -> None:
    score = np.random.default_rng(seed).random((images, rows * columns * merge**2), np.float32)
    grid = np.array([rows, merge, columns, merge])
    (pooled,) = run("VtrPoolPatches", score=score, grid=grid)
    image = score.reshape(images, rows * merge, columns * merge)
    for row in range(rows):
        for column in range(columns):
            down, right = row * merge, column * merge
            window = image[:, down : down + merge, right : right + merge]
            token = pooled[:, row * columns + column]
            np.testing.assert_allclose(token, window.mean((1, 2)), rtol=1e-6)


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=12), st.data())
def test_the_best_tokens_stand_in_their_own_order(levels: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(levels)))
    order = data.draw(st.permutations(range(len(levels))))
    score = np.array([levels, [levels[i] for i in order]], np.float32)
    (source,) = run("VtrTopTokens", score=score, keep=np.array([keep]))
    assert source.tolist() == [topmost(list(row), keep) for row in score]


@pytest.mark.parametrize("side", [4, 12, 24])
def test_of_many_equal_tokens_the_first_are_best(side: int) -> None:
    score = np.random.default_rng(side).integers(0, 3, (3, side**2)).astype(np.float32)
    for keep in (1, side, side**2 // 2, side**2 - 1, side**2):
        (source,) = run("VtrTopTokens", score=score, keep=np.array([keep]))
        assert source.tolist() == [topmost(list(row), keep) for row in score]
