"""MustDrop's windows and key set as operators, against their definition in numpy."""

import itertools
from typing import Any

import numpy as np
from cut_oracle import Array
from hypothesis import assume, given
from hypothesis import strategies as st
from test_ops import run

GRIDS = st.tuples(st.integers(2, 7), st.integers(2, 7))
WINDOWS = st.sampled_from([(2, 2), (3, 3), (2, 3)])


def members(grid: tuple[int, int], window: tuple[int, int]) -> list[list[int]]:
    """The tokens of each whole window, window by window; what is left over belongs to none."""
    found = []
    for top in range(0, grid[0] - window[0] + 1, window[0]):
        for left in range(0, grid[1] - window[1] + 1, window[1]):
            rows, columns = range(top, top + window[0]), range(left, left + window[1])
            found.append([r * grid[1] + c for r, c in itertools.product(rows, columns)])
    return found


def smooth(images: int, tokens: int, seed: int) -> Array:
    """Tokens that are like their neighbours in some places."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(images, tokens, 4)) * rng.choice([0.1, 2], (images, tokens, 1))
    return np.cumsum(steps, 1).astype(np.float32)


@given(st.integers(0, 3), GRIDS, WINDOWS, st.integers(0, 99))
def test_a_window_is_as_like_as_its_pairs_are(
    images: int, grid: tuple[int, int], window: tuple[int, int], seed: int
) -> None:
    assume(members(grid, window))
    stream = smooth(images, grid[0] * grid[1], seed)
    (likeness,) = run("VtrLikeness", stream=stream, grid=np.array(grid), window=np.array(window))
    for image, own in zip(stream.astype(float), likeness, strict=True):
        for tokens, value in zip(members(grid, window), own, strict=True):
            pairs = [
                image[i] @ image[j] / np.linalg.norm(image[i]) / np.linalg.norm(image[j])
                for i, j in itertools.permutations(tokens, 2)
            ]
            assert abs(np.mean(pairs) - value) < 1e-5


@given(st.integers(0, 3), GRIDS, WINDOWS, st.integers(0, 99))
def test_windows_become_their_means_and_all_others_stay(
    images: int, grid: tuple[int, int], window: tuple[int, int], seed: int
) -> None:
    """Those of an image first, in order; what is padded is as wide as the widest image."""
    tokens, own = grid[0] * grid[1], members(grid, window)
    assume(own)
    stream, rng = smooth(images, tokens, seed), np.random.default_rng(seed)
    likeness = rng.random((images, len(own)), np.float32)
    windows: dict[str, Any] = {"window": np.array(window)}
    chosen, width = run(
        "VtrLikeWindows", likeness=likeness, stream=stream, similarity=0.5, **windows
    )
    assert (chosen == (likeness >= 0.5)).all()
    merged, source, counts = run(
        "VtrMergeWindows", stream=stream, grid=np.array(grid), chosen=chosen, width=width, **windows
    )
    size = window[0] * window[1]
    assert counts.tolist() == [tokens - (size - 1) * int(row.sum()) for row in chosen]
    assert int(width[0]) == max(counts.tolist(), default=0) == merged.shape[1]
    for image in range(images):
        gone = [w for w, is_chosen in zip(own, chosen[image], strict=True) if is_chosen]
        left = sorted(set(range(tokens)) - {token for w in gone for token in w})
        expected = [stream[image][w].mean(0) for w in gone] + [stream[image][t] for t in left]
        count = counts[image]
        np.testing.assert_allclose(merged[image, :count], np.array(expected), atol=1e-5)
        assert source[image, :count].tolist() == [-1] * len(gone) + left
        total = stream[image].sum(0)
        weights = np.where(source[image, :count] < 0, size, 1)[:, None]
        np.testing.assert_allclose((merged[image, :count] * weights).sum(0), total, atol=1e-3)


@given(st.integers(0, 3), st.integers(1, 9), st.data())
def test_the_best_are_flagged_and_ties_go_to_the_lower(
    images: int, tokens: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    score = rng.integers(0, 4, (images, tokens)).astype(np.float32)
    each = rng.integers(0, tokens + 1, images)
    keep = data.draw(st.integers(0, tokens))
    (flags,) = run("VtrTopFlags", score=score, count=each)
    (alike,) = run("VtrTopFlags", score=score, count=np.array([keep]))
    (chosen,) = run("VtrBestWindows", likeness=score, keep=np.array([keep]))
    for image in range(images):
        order = sorted(range(tokens), key=lambda t, image=image: (-score[image, t], t))  # type: ignore[misc]  # a default binds it
        assert set(np.flatnonzero(flags[image]).tolist()) == set(order[: each[image]])
        assert set(np.flatnonzero(alike[image]).tolist()) == set(order[:keep])
    assert (alike == chosen).all()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_padded_rows_neither_ask_nor_are_asked(
    images: int, heads: int, rows: int, by_first: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, rows + 1, images)
    query, key = (rng.normal(size=(images, heads, rows, 4)).astype(np.float32) for _ in range(2))
    real, mask = run("VtrRealRows", counts=counts, stream=query[:, 0])
    assert real.tolist() == [[row < count for row in range(rows)] for count in counts]
    assert (mask == np.broadcast_to(real[:, None, None], (images, 1, rows, rows))).all()
    asking = query[:, :, :1] if by_first else query
    (score,) = run("VtrAskedBy", query=asking, key=key, real=real, scale=0.5)
    for image, count in enumerate(counts):
        own = asking[image, :, :count].astype(float) @ key[image, :, :count].transpose(0, 2, 1) / 2
        odds = np.exp(own - own.max(-1, keepdims=True))
        expected = (odds / odds.sum(-1, keepdims=True)).mean((0, 1))
        np.testing.assert_allclose(score[image, :count], expected, atol=1e-5)
        assert (score[image, count:] == -1).all()
