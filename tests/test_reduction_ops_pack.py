"""The tokens of images that keep unlike numbers of them, in one row."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_ops import run


@given(st.lists(st.integers(0, 4), max_size=4), st.integers(1, 4), st.integers(0, 99))
def test_tokens_of_all_images_lie_one_after_the_other(
    counts: list[int], width: int, seed: int
) -> None:
    counts = [min(count, width) for count in counts]
    rng = np.random.default_rng(seed)
    padded = rng.normal(size=(len(counts), width, 3)).astype("f4")
    (packed,) = run("VtrPackRows", padded=padded, counts=np.array(counts, np.int64))
    expected = [token for row, count in zip(padded, counts, strict=True) for token in row[:count]]
    assert packed.tolist() == np.array(expected, "f4").reshape(-1, 3).tolist()
