"""FocusLLaVA's parts against numpy: maxima at three scales, the router, what was chosen packed."""

import math

import numpy as np
from cut_oracle import Array
from hypothesis import assume, given
from hypothesis import strategies as st
from test_ops import run

SEED = st.integers(0, 2**32 - 1)
SIZES = st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 5))  # images, blocks, width


def gelu(value: Array) -> Array:
    return value * (1 + np.vectorize(math.erf, otypes=[float])(value / math.sqrt(2))) / 2


@given(SIZES, st.sampled_from(["f4", "f2"]), SEED)
def test_a_block_has_one_maximum_and_four_and_itself(
    sizes: tuple[int, int, int], dtype: str, seed: int
) -> None:
    images, blocks, width = sizes
    stream = np.random.default_rng(seed).normal(size=(images, blocks, 16, width)).astype(dtype)
    (scales,) = run("VtrScales", stream=stream)
    square = stream.reshape(images, blocks, 4, 4, width)
    assert (scales[:, :, 0] == stream.max(2)).all()
    for place, (row, column) in enumerate(((0, 0), (0, 2), (2, 0), (2, 2))):
        quarter = square[:, :, row : row + 2, column : column + 2]
        assert (scales[:, :, 1 + place] == quarter.max((2, 3))).all()
    assert (scales[:, :, 5:] == stream).all()
    assert scales.shape == (images, blocks, 21, width)


@given(SIZES, st.integers(1, 4), SEED)
def test_a_router_sees_the_mean_of_what_is_there_whatever_its_order(
    sizes: tuple[int, int, int], inner: int, seed: int
) -> None:
    images, blocks, width = sizes
    rng = np.random.default_rng(seed)
    stream = rng.normal(size=(images, blocks, 16, width)).astype(np.float32)
    present = rng.integers(0, 2, (blocks, 16))
    present[:, 0] = 1
    first, second = rng.normal(size=(2, inner)), rng.normal(size=(2, 3))
    weights = {
        "inner": rng.normal(size=(inner, width)).astype(np.float32),
        "inner_bias": first[0].astype(np.float32),
        "outer": rng.normal(size=(3, inner)).astype(np.float32),
        "outer_bias": second[0].astype(np.float32),
    }
    weight = present[None, :, :, None] / present.sum(-1)[None, :, None, None]
    mean = (stream.astype(float) * weight).sum(2)
    active = gelu(mean @ weights["inner"].T + weights["inner_bias"])
    logits = active @ weights["outer"].T + weights["outer_bias"]
    ordered = np.sort(logits, -1)
    assume((ordered[..., -1] - ordered[..., -2] > 1e-4).all())
    (choice,) = run("VtrRoute", stream=stream, present=present, **weights)
    assert (choice == logits.argmax(-1)).all()
    stream[:, present == 0] = np.nan  # nobody looks there
    order = rng.permutation(16)
    shuffled = {"stream": stream[:, :, order], "present": present[:, order]}
    assert (run("VtrRoute", **shuffled, **weights)[0] == choice).all()


def test_of_equal_scales_the_coarsest_is_taken() -> None:
    weights = {
        "inner": np.zeros((1, 2), np.float32),
        "inner_bias": np.zeros(1, np.float32),
        "outer": np.zeros((3, 1), np.float32),
    }
    feeds = {"stream": np.ones((1, 1, 16, 2), np.float32), "present": np.ones((1, 16), np.int64)}
    for bias, expected in (([0, 0, 0], 0), ([0, 1, 1], 1), ([0, 0, 1], 2)):
        (choice,) = run("VtrRoute", outer_bias=np.array(bias, np.float32), **feeds, **weights)
        assert choice.tolist() == [[expected]]


@given(st.integers(0, 3), st.integers(1, 12), SEED, st.data())
def test_what_is_chosen_stands_in_front_in_its_order(
    images: int, candidates: int, seed: int, data: st.DataObject
) -> None:
    chosen = np.random.default_rng(seed).random((images, candidates)) < 0.4
    width = data.draw(st.integers(int(chosen.sum(-1).max(initial=0)), candidates))
    source, counts = run("VtrPackChosen", chosen=chosen, width=np.array([width]))
    assert source.shape == (images, width)
    assert counts.tolist() == chosen.sum(-1).tolist()
    for row, own, count in zip(source, chosen, counts, strict=True):
        assert row[:count].tolist() == np.flatnonzero(own).tolist()
