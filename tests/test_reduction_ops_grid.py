"""Windows of a grid of tokens, pooled, shuffled and resized: against numpy and torch."""

import numpy as np
import pytest
import torch
from cut_oracle import Array
from hypothesis import given
from hypothesis import strategies as st
from test_ops import run

SIZES = st.tuples(st.integers(1, 2), st.integers(2, 7), st.integers(2, 7), st.integers(1, 3))
WINDOWS = st.tuples(st.integers(1, 2), st.integers(1, 2))
SEED = st.integers(0, 2**32 - 1)


def lattice(images: int, rows: int, columns: int, width: int, seed: int) -> Array:
    drawn = np.random.default_rng(seed).normal(size=(images, rows, columns, width))
    return drawn.astype(np.float32)


def given_as(whole: Array, window: tuple[int, int]) -> dict[str, Array]:
    images, rows, columns, width = whole.shape
    stream = whole.reshape(images, rows * columns, width)
    return {"stream": stream, "grid": np.array([rows, columns]), "window": np.array(window)}


@given(SIZES, WINDOWS, SEED)
def test_windows_lie_row_by_row_and_a_rest_is_left_out(
    sizes: tuple[int, int, int, int], window: tuple[int, int], seed: int
) -> None:
    whole = lattice(*sizes, seed)
    high, wide = window
    feeds = given_as(whole, window)
    windows, mean, most = (
        run(name, **feeds)[0] for name in ("VtrWindows", "VtrPoolMean", "VtrPoolMax")
    )
    expected = [
        whole[:, row : row + high, column : column + wide].reshape(sizes[0], -1, sizes[3])
        for row in range(0, sizes[1] - high + 1, high)
        for column in range(0, sizes[2] - wide + 1, wide)
    ]
    assert (windows == np.stack(expected, 1)).all()
    np.testing.assert_allclose(mean, np.stack([each.mean(1) for each in expected], 1), atol=1e-6)
    assert (most == np.stack([each.max(1) for each in expected], 1)).all()


@pytest.mark.parametrize("side", [4, 12, 24])
@pytest.mark.parametrize("factor", [2, 4])
def test_means_of_whole_windows_keep_the_mean_and_largest_ones_the_largest(
    side: int, factor: int
) -> None:
    whole = lattice(2, side, side, 3, side)
    feeds = given_as(whole, (factor, factor))
    (mean,), (most,) = (run(name, **feeds) for name in ("VtrPoolMean", "VtrPoolMax"))
    assert mean.shape == (2, (side // factor) ** 2, 3)
    np.testing.assert_allclose(mean.mean(1), whole.mean((1, 2)), atol=1e-6)
    assert (most.max(1) == whole.max((1, 2))).all()


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_a_type_goes_through(dtype: str) -> None:
    feeds = given_as(lattice(1, 4, 4, 2, 0).astype(dtype), (2, 2))
    resized = {"stream": feeds["stream"], "grid": feeds["grid"], "target": np.array([3, 3])}
    for name in ("VtrPoolMean", "VtrPoolMax", "VtrPixelShuffle"):
        assert run(name, **feeds)[0].dtype == np.dtype(dtype)
    assert run("VtrResizeGrid", **resized)[0].dtype == np.dtype(dtype)


@pytest.mark.parametrize("side", [4, 12, 24])
def test_pixels_are_shuffled_as_torch_unshuffles_them_and_none_is_lost(side: int) -> None:
    whole = lattice(2, side, side, 3, side)
    (shuffled,) = run("VtrPixelShuffle", **given_as(whole, (2, 2)))
    planes = torch.from_numpy(whole).permute(0, 3, 1, 2)
    apart = torch.nn.functional.pixel_unshuffle(planes, 2)  # [I, C·4, h, w], the window innermost
    expected = apart.unflatten(1, (3, 4)).permute(0, 3, 4, 2, 1).reshape(2, side**2 // 4, 12)
    assert (shuffled == expected.numpy()).all()
    assert sorted(shuffled.ravel()) == sorted(whole.ravel())


@given(
    st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    SEED,
)
def test_a_grid_is_resized_as_torch_interpolates_it(
    sizes: tuple[int, int, int, int], target: tuple[int, int], seed: int
) -> None:
    whole = lattice(*sizes, seed)
    feeds = given_as(whole, (1, 1))
    del feeds["window"]
    (actual,) = run("VtrResizeGrid", target=np.array(target), **feeds)
    planes = torch.from_numpy(whole).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(planes, size=target, mode="bilinear")
    flat = expected.flatten(2).transpose(1, 2).numpy()
    np.testing.assert_allclose(actual, flat, atol=1e-5)
    assert actual.min() >= whole.min() - 1e-6
    assert actual.max() <= whole.max() + 1e-6


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_wide_tokens_are_normed_and_projected_twice(dtype: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"stream": (2, 3, 8), "norm": (8,), "norm_bias": (8,), "inner": (5, 8)}
    shapes |= {"inner_bias": (5,), "outer": (5, 5), "outer_bias": (5,)}
    feeds = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    (projected,) = run("VtrProjectWide", **feeds)
    given = {name: torch.from_numpy(value).double() for name, value in feeds.items()}
    functional = torch.nn.functional
    normed = functional.layer_norm(given["stream"], (8,), given["norm"], given["norm_bias"])
    active = functional.gelu(functional.linear(normed, given["inner"], given["inner_bias"]))
    expected = functional.linear(active, given["outer"], given["outer_bias"]).numpy()
    assert projected.dtype == np.dtype(dtype)
    np.testing.assert_allclose(projected, expected, atol=1e-5 if dtype == "f4" else 2e-2)
