"""Unlike tokens, near tokens merged and greedy choices, against lists and numpy."""

from typing import Any

import numpy as np
import pytest
from cut_oracle import Array
from hypothesis import given
from hypothesis import strategies as st
from test_ops import run

SEED = st.integers(0, 2**32 - 1)
TAKEN = -np.inf


def unit(stream: Array) -> Array:
    wide = stream.astype(float)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12))


def farthest(distance: Array, keep: int) -> list[int]:
    """Greedily far from all that were taken; the first is the one that is loneliest."""
    tokens = range(len(distance))
    chosen = list[int]()
    for _ in range(keep):
        others = [
            [distance[i, j] for j in (chosen or tokens) if chosen or j != i] or [0.0]
            for i in tokens
        ]
        score = [TAKEN if i in chosen else min(others[i]) for i in tokens]
        chosen.append(max(tokens, key=lambda i: (score[i], -i)))
    return sorted(chosen)


def thinned(cosine: Array, listed: list[int], removals: list[int]) -> list[int]:
    """Of the tokens at even places those most like one at an odd place go, round by round."""
    for drop in removals:
        even, odd = listed[::2], listed[1::2]
        most = {i: max((cosine[i, j] for j in odd), default=-4) for i in even}
        listed = sorted(even, key=lambda i: (-most[i], i))[drop:] + odd
    return listed


@given(st.integers(0, 2), st.integers(1, 6), st.integers(1, 5), st.sampled_from(["f4", "f2"]), SEED)
def test_a_cosine_knows_no_length_and_of_nothing_is_zero(
    images: int, tokens: int, width: int, dtype: str, seed: int
) -> None:
    stream = np.random.default_rng(seed).normal(size=(images, tokens, width)).astype(dtype)
    stream[:, 0] = 0
    (actual,) = run("VtrUnit", stream=stream)
    (cosine,) = run("VtrCosine", stream=stream)
    expected = unit(stream)
    assert (actual.dtype, cosine.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    np.testing.assert_allclose(cosine, expected @ expected.swapaxes(1, 2), atol=2e-6)
    assert not cosine[:, 0].any()


@given(st.integers(1, 2), st.integers(2, 9), st.integers(1, 4), SEED, st.data())
def test_the_farthest_of_the_rest_comes_next(
    images: int, tokens: int, width: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    points = np.round(2 * rng.normal(size=(images, tokens, width))) / 2  # many stand together
    cosine = np.float32(np.round(unit(points) @ unit(points).swapaxes(1, 2), 3))
    keep = data.draw(st.integers(1, tokens))
    (source,) = run("VtrFarthest", cosine=cosine, keep=np.array([keep]))
    distance = np.float32(1) - cosine
    assert source.tolist() == [farthest(each, keep) for each in distance]


def spread(cosine: Array, chosen: Any) -> float:
    """The least distance between two of them."""
    distance = 1 - cosine[np.ix_(chosen, chosen)]
    return float((distance + 9 * np.eye(len(chosen))).min())


@pytest.mark.parametrize(("side", "keep"), [(4, 5), (12, 36), (24, 57)])
def test_what_is_chosen_lies_farther_apart_than_chance(side: int, keep: int) -> None:
    rng = np.random.default_rng(side)
    stream = rng.normal(size=(2, side**2, 8)).astype(np.float32)
    (cosine,) = run("VtrCosine", stream=stream)
    (source,) = run("VtrFarthest", cosine=cosine, keep=np.array([keep]))
    for each, kept in zip(cosine, source, strict=True):
        assert len(set(kept.tolist())) == keep
        assert (np.diff(kept) > 0).all()
        by_chance = [spread(each, rng.permutation(side**2)[:keep]) for _ in range(50)]
        assert spread(each, kept) > np.mean(by_chance)
    moved = rng.permutation(side**2)
    (again,) = run("VtrFarthest", cosine=cosine[:, moved][:, :, moved], keep=np.array([keep]))
    assert [sorted(moved[row].tolist()) for row in again] == source.tolist()


@given(st.integers(1, 2), st.integers(2, 14), SEED, st.data())
def test_copies_of_other_tokens_go_round_by_round(
    images: int, tokens: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    cosine = np.float32(rng.integers(-4, 4, (images, tokens, tokens)) / 4)  # many are equal
    length, drop = tokens, data.draw(st.integers(1, 3))
    rounds = 0
    while length > 1 and (length + 1) // 2 >= drop and data.draw(st.booleans()):
        length, rounds = length - drop, rounds + 1
    place = np.tile(np.arange(tokens), (images, 1))
    fixed = {"drop": np.array([drop]), "rounds": np.array([rounds])}
    places, left = run("VtrThinOut", cosine=cosine, place=place, length=np.array([tokens]), **fixed)
    assert left.tolist() == [length]
    for each, row in zip(cosine, places, strict=True):
        listed = thinned(each, list(range(tokens)), [drop] * rounds)
        assert np.argsort(row, kind="stable")[:length].tolist() == listed
        assert (np.delete(row, listed) == tokens).all()


@given(st.integers(1, 2), st.integers(1, 8), st.integers(1, 4), st.sampled_from(["f4", "f2"]), SEED)
def test_near_tokens_add_their_mean_to_a_target(
    images: int, tokens: int, targets: int, dtype: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(images, tokens, 3)).astype(np.float32)
    stream = rng.normal(size=(images, tokens, 5)).astype(dtype)
    order = rng.permutation(tokens)
    at, rest = np.sort(order[:targets]), np.sort(order[targets:])
    (actual,) = run("VtrMergeNearest", keys=keys, stream=stream, targets=at, merged=rest)
    assert actual.dtype == np.dtype(dtype)
    for image, key in zip(range(images), unit(keys), strict=True):
        nearest = [int(np.argmax(key[at] @ key[i])) for i in rest]
        for number, target in enumerate(at):
            own = [i for i, to in zip(rest, nearest, strict=True) if to == number]
            mean = stream[image, own].astype(float).mean(0) if own else 0
            expected = stream[image, target].astype(float) + mean
            np.testing.assert_allclose(
                actual[image, number], expected, atol=1e-5 if dtype == "f4" else 4e-3
            )


def test_of_equally_near_targets_the_first_takes_it() -> None:
    keys = np.ones((1, 5, 2), np.float32)
    stream = np.arange(5, dtype=np.float32).reshape(1, 5, 1)
    (merged,) = run(
        "VtrMergeNearest",
        keys=keys,
        stream=stream,
        targets=np.array([1, 3]),
        merged=np.array([0, 2, 4]),
    )
    assert merged.tolist() == [[[1 + 2], [3]]]


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.booleans(), SEED)
def test_a_tokens_key_is_the_mean_of_heads_and_patches(
    images: int, side: int, merge: int, class_token: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    key = rng.normal(size=(images, 3, class_token + (side * merge) ** 2, 4)).astype(np.float32)
    grid = np.array([side, merge, side, merge])
    (keys,) = run("VtrTokenKeys", key=key, grid=grid, first=np.array([int(class_token)]))
    mean = key.astype(float).mean(1)[:, int(class_token) :]
    lattice = mean.reshape(images, side, merge, side, merge, 4)
    np.testing.assert_allclose(keys, lattice.mean((2, 4)).reshape(images, -1, 4), atol=1e-6)


@given(st.integers(0, 3), st.integers(0, 12), SEED)
def test_tokens_are_put_in_order(images: int, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = np.array([rng.permutation(20)[:tokens] for _ in range(images)]).reshape(images, tokens)
    (ordered,) = run("VtrAscending", source=source.astype(np.int64))
    assert ordered.tolist() == np.sort(source).tolist()
