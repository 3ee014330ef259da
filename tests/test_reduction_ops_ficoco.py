"""FiCoCo-V's operators against arXiv 2411.17686, section 3, in numpy."""

from typing import Any

import numpy as np
import pytest
from cut_oracle import Array
from hypothesis import given
from hypothesis import strategies as st
from test_ops import run

SEEDS = st.integers(0, 999)


def projections(seed: int, tokens: int, dtype: str = "f4") -> tuple[Array, Array]:
    """Query and key [2, heads, tokens, 4] of a random layer."""
    rng = np.random.default_rng(seed)
    shape = (2, int(rng.integers(1, 4)), tokens, 4)
    query, key = rng.normal(size=(2, *shape)).astype(dtype)
    return query, key


def unit(row: Array) -> Array:
    return np.asarray(row / np.linalg.norm(row))


@given(SEEDS, st.integers(2, 9), st.sampled_from(["f4", "f2"]))
def test_a_token_is_redundant_that_asks_its_neighbours_and_not_the_class_token(
    seed: int, tokens: int, dtype: str
) -> None:
    query, key = projections(seed, tokens, dtype)
    important, redundant = run("VtrClassRedundancy", query=query, key=key)
    for image, (q, k) in enumerate(zip(query.astype(float), key.astype(float), strict=True)):
        logits = np.mean([a @ b.T for a, b in zip(q, k, strict=True)], axis=0)
        np.testing.assert_allclose(important[image], logits[0, 1:], atol=2e-5)
        np.testing.assert_allclose(redundant[image], logits[1:, 1:].mean(axis=1), atol=2e-5)


@given(SEEDS, st.integers(1, 8))
def test_without_a_class_token_what_differs_from_the_mean_key_is_important(
    seed: int, tokens: int
) -> None:
    query, key = projections(seed, tokens)
    important, redundant = run("VtrKeyRedundancy", query=query, key=key)
    for image, (q, k) in enumerate(zip(query.astype(float), key.astype(float), strict=True)):
        patches = k.mean(axis=0)
        alike = np.array([unit(patches.mean(axis=0)) @ unit(patch) for patch in patches])
        logits = np.mean([a @ b.T for a, b in zip(q, k, strict=True)], axis=0)
        np.testing.assert_allclose(important[image], -alike, atol=2e-5)
        np.testing.assert_allclose(redundant[image], logits.mean(axis=1), atol=2e-5)


@given(SEEDS, st.integers(1, 6), st.sampled_from([0.0, 0.35, 1.0]))
def test_two_measures_weigh_as_directions_not_by_their_size(
    seed: int, tokens: int, beta: float
) -> None:
    important, redundant = np.random.default_rng(seed).normal(size=(2, 2, tokens)).astype("f4")
    (score,) = run("VtrWeighUnits", important=important, redundant=redundant, beta=beta)
    for image in range(2):
        expected = beta * unit(important[image]) - (1 - beta) * unit(redundant[image])
        np.testing.assert_allclose(score[image], expected, atol=1e-6)
    none = np.zeros_like(important)
    assert np.isfinite(run("VtrWeighUnits", important=none, redundant=none, beta=beta)).all()


@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_in_each_window_the_lowest_survivor_goes_lower_and_no_other(
    seed: int, rows: int, columns: int
) -> None:
    rng = np.random.default_rng(seed)
    left = int(rng.integers(1, rows * columns + 1))
    picked = [sorted(rng.permutation(rows * columns)[:left]) for _ in range(2)]
    source = np.array(picked, np.int64)
    score = rng.integers(-3, 4, (2, left)).astype("f4") / 2  # ties are common
    (actual,) = run("VtrWindowPenalty", score=score, source=source, grid=np.array([rows, columns]))
    for image in range(2):
        windows: dict[tuple[int, int], list[int]] = {}
        for token, position in enumerate(source[image]):
            row, column = divmod(int(position), columns)
            windows.setdefault((row // 2, column // 2), []).append(token)
        expected = score[image].copy()
        for members in windows.values():
            least = min(members, key=lambda token: (score[image, token], token))
            expected[least] *= 0.5 if expected[least] > 0 else 2
        assert actual[image].tolist() == expected.tolist()


@given(SEEDS, st.integers(0, 7), st.integers(0, 7))
def test_tokens_are_split_into_the_best_and_the_rest_both_in_order(
    seed: int, keep: int, drop: int
) -> None:
    score = np.random.default_rng(seed).integers(0, 4, (3, keep + drop)).astype("f4")
    kept, dropped = run("VtrSplitTokens", score=score, keep=np.array([keep]))
    for row, chosen, others in zip(score, kept, dropped, strict=True):
        best = sorted(range(keep + drop), key=lambda token: (-row[token], token))[:keep]
        assert chosen.tolist() == sorted(best)
        assert others.tolist() == sorted(set(range(keep + drop)) - set(best))


@given(SEEDS, st.integers(1, 6), st.sampled_from(["f4", "f2"]))
def test_logits_of_some_rows_and_columns_are_the_mean_over_heads(
    seed: int, tokens: int, dtype: str
) -> None:
    query, key = projections(seed, tokens, dtype)
    rng = np.random.default_rng(seed)
    rows, columns = (rng.integers(0, tokens, (2, n)) for n in (3, 2))
    (actual,) = run("VtrHeadLogits", query=query, key=key, rows=rows, columns=columns, scale=0.5)
    whole = np.einsum("bhid,bhjd->bij", query.astype(float), key.astype(float)) / query.shape[1] / 2
    expected = np.stack([w[np.ix_(r, c)] for w, r, c in zip(whole, rows, columns, strict=True)])
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def shared(logits: Array, nearest: int) -> Array:
    """``[dropped, kept]``: of each dropped token, what each kept one is given."""
    share = np.zeros(logits.shape)
    for token, row in enumerate(logits.astype(float)):
        targets = sorted(range(len(row)), key=lambda kept: (-row[kept], kept))[:nearest]
        attention = np.exp(row) / np.exp(row).sum()
        share[token, targets] = attention[targets] / attention[targets].sum()
    return share


@given(
    SEEDS, st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.sampled_from(["f4", "f2"])
)
def test_a_kept_token_stays_half_itself_and_nothing_of_the_dropped_is_lost(
    seed: int, kept: int, drop: int, nearest: int, dtype: str
) -> None:
    nearest = min(nearest, kept)
    rng = np.random.default_rng(seed)
    stream, dropped = (rng.normal(size=(2, n, 3)).astype(dtype) for n in (kept, drop))
    logits = rng.integers(-3, 4, (2, drop, kept)).astype("f4")
    feeds: dict[str, Any] = {"stream": stream, "dropped": dropped, "logits": logits}
    (filled,) = run("VtrSelfPreserve", **feeds, nearest=np.array([nearest]))
    assert filled.dtype == stream.dtype
    for image in range(2):
        share = shared(logits[image], nearest)
        size = 1 + share.sum(axis=0)[:, None]
        given_away = share.T @ dropped[image].astype(float)
        expected = (stream[image].astype(float) + given_away) / size
        tolerance = 1e-5 if dtype == "f4" else 4e-3
        np.testing.assert_allclose(filled[image], expected, atol=tolerance)
        total = np.concatenate((stream[image], dropped[image])).astype(float).sum(0)
        np.testing.assert_allclose((filled[image] * size).sum(0), total, atol=20 * tolerance)


@given(SEEDS)
def test_the_order_of_kept_and_of_dropped_tokens_changes_nothing_but_the_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stream, dropped = (rng.normal(size=(1, n, 3)).astype("f4") for n in (5, 4))
    logits = rng.normal(size=(1, 4, 5)).astype("f4")
    nearest = np.array([2])
    feeds: dict[str, Any] = {
        "stream": stream,
        "dropped": dropped,
        "logits": logits,
        "nearest": nearest,
    }
    (filled,) = run("VtrSelfPreserve", **feeds)
    kept, gone = rng.permutation(5), rng.permutation(4)
    mixed: dict[str, Any] = {"stream": stream[:, kept], "dropped": dropped[:, gone]}
    mixed["logits"] = logits[:, gone][:, :, kept]
    (again,) = run("VtrSelfPreserve", **mixed, nearest=nearest)
    np.testing.assert_allclose(again, filled[:, kept], atol=1e-6)


@pytest.mark.parametrize("name", ["VtrClassRedundancy", "VtrKeyRedundancy"])
def test_no_image_is_no_error(name: str) -> None:
    nothing = np.zeros((0, 2, 5, 4), np.float32)
    important, redundant = run(name, query=nothing, key=nothing)
    (score,) = run("VtrWeighUnits", important=important, redundant=redundant, beta=0.35)
    assert score.shape == (0, 5 - (name == "VtrClassRedundancy"))
    source = np.zeros(score.shape, np.int64)
    grid = np.array([2, 3])
    assert run("VtrWindowPenalty", score=score, source=source, grid=grid)[0].shape == score.shape
    rows = np.zeros((0, 2), np.int64)
    feeds: dict[str, Any] = {"query": nothing, "key": nothing, "rows": rows, "columns": rows}
    assert run("VtrHeadLogits", **feeds, scale=1.0)[0].shape == (0, 2, 2)
