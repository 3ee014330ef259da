"""The cache behind a prefill: every layer behind the first cut holds the last stage's tokens."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import run

from vtr_export.errors import AnalysisError
from vtr_export.passes.compact_cache import compact_cache

Array = np.ndarray[Any, Any]
STAGE_OF_LAYER = (0, 1, 2, 2, 3)
HEADS, WIDTH = 2, 3
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def decoder(cuts: int = 3, cache: tuple[str, ...] = ("batch", "2", "past", "3")) -> ir.Model:
    """The signature of a decoder with cuts; it computes nothing."""
    inputs = [
        ir.val(f"past_key_values.{layer}.{what}", FLOAT, own_shape(cache, stage))
        for layer, stage in enumerate(STAGE_OF_LAYER)
        if stage <= cuts
        for what in ("key", "value")
    ]
    inputs += [
        ir.val(f"past_mask.{cut}", INT64, ["batch", f"past_{cut + 1}"]) for cut in range(cuts)
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 24}, name="decoder")
    return ir.Model(graph, ir_version=11)


def own_shape(cache: tuple[str, ...], stage: int) -> list[int | str]:
    named = {"past": f"past_{stage}" if stage else "past"}
    return [int(dim) if dim.isdigit() else named.get(dim, dim) for dim in cache]


@pytest.fixture(scope="module")
def compaction() -> onnxruntime.InferenceSession:
    model = compact_cache(decoder())
    assert model is not None
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString())


class History:
    """What stages hold: names of tokens, row by row, from -1 down for what earlier calls left."""

    def __init__(self, draw: st.DataObject, batch: int) -> None:
        new = [list(range(draw.draw(st.integers(1, 9))))] * batch
        self.past = [draw.draw(st.integers(0, 4)) for _ in range(4)]
        self.stages, self.kept = [new], list[Array]()
        for _ in range(3):
            width = draw.draw(st.integers(1, len(new[0])))
            columns = [sorted(draw.draw(st.permutations(range(len(new[0]))))[:width]) for _ in new]
            new = [[row[c] for c in kept] for row, kept in zip(new, columns, strict=True)]
            self.kept.append(np.array(columns, np.int64))
            self.stages.append(new)
        self.real = [draw.draw(st.integers(0, 1)) for _ in range(9)]

    def names(self, stage: int, tokens: list[list[int]]) -> Array:
        """``[B, T]``: what a stage's cache holds, its past and these."""
        past = list(range(-self.past[stage], 0))
        return np.array([past + row for row in tokens], np.int64)

    def mask(self, names: Array) -> Array:
        """A token's own bit; the past is real."""
        return np.where(names < 0, 1, np.array(self.real)[np.maximum(names, 0)])


def cache_of(names: Array, layer: int, what: str) -> Array:
    """``[B, heads, T, width]`` that tell token, layer, head and element."""
    element = np.arange(HEADS * WIDTH).reshape(HEADS, 1, WIDTH)
    own = 100 * names[:, None, :, None] + 10_000 * layer + (5_000 if what == "value" else 0)
    return (own + element).astype(np.float32)


@settings(max_examples=40)
@given(st.data(), st.integers(1, 3))
def test_what_a_later_cut_dropped_leaves_every_cache_behind_the_first(
    compaction: onnxruntime.InferenceSession, draw: st.DataObject, batch: int
) -> None:
    """Tokens of one stage are those of the last; earlier calls' stay, and nothing is mixed up."""
    history = History(draw, batch)
    feeds: dict[str, Array] = {}
    for cut, kept in enumerate(history.kept):
        names = history.names(cut + 1, history.stages[cut + 1])
        feeds |= {f"kept.{cut}": kept, f"present_mask.{cut}": history.mask(names)}
    layers = [(layer, stage) for layer, stage in enumerate(STAGE_OF_LAYER) if stage in (1, 2)]
    for layer, stage in layers:
        names = history.names(stage, history.stages[stage])
        feeds |= {f"present.{layer}.{w}": cache_of(names, layer, w) for w in ("key", "value")}
    outputs = [value.name for value in compaction.get_outputs()]
    found = dict(zip(outputs, compaction.run(None, feeds), strict=True))
    assert len(found) == 2 * len(layers) + 2
    for layer, stage in layers:
        left = history.names(stage, history.stages[-1])
        for what in ("key", "value"):
            expected = cache_of(left, layer, what)
            assert np.array_equal(found[f"past_key_values.{layer}.{what}"], expected)
        assert np.array_equal(found[f"past_mask.{stage - 1}"], history.mask(left))


def test_a_stand_in_is_masked_in_every_stage() -> None:
    """A row without pads names its last column for one it lacks: only the last mask tells."""
    mask, last = np.array([[1, 1, 1, 1, 1]]), np.array([[1, 0, 1]])
    (found,) = run(
        "VtrCacheMask",
        mask=mask,
        own=np.zeros((1, 3), np.int64),
        last_mask=last,
        last=np.zeros((1, 2), np.int64),
    )
    assert found.tolist() == [[1, 1, 0, 1]]


def test_columns_come_behind_those_of_earlier_calls() -> None:
    own, mask = np.zeros((2, 3), np.int64), np.ones((2, 5), np.int64)
    (found,) = run("VtrCacheColumns", columns=np.array([[0, 2], [1, 2]]), own=own, mask=mask)
    assert found.tolist() == [[0, 1, 2, 4], [0, 1, 3, 4]]


def test_a_cache_is_narrowed_in_every_head() -> None:
    cache = np.arange(2 * 2 * 3 * 2, dtype=np.float32).reshape(2, 2, 3, 2)
    columns = np.array([[0, 2], [1, 2]])
    (found,) = run("VtrNarrowCache", stream=cache, indices=columns)
    expected = [[head[own] for head in row] for row, own in zip(cache, columns, strict=True)]
    assert np.array_equal(found, np.array(expected))


@pytest.mark.parametrize("cuts", [0, 1])
def test_with_fewer_than_two_cuts_nothing_is_left_to_do(cuts: int) -> None:
    assert compact_cache(decoder(cuts)) is None


def test_a_cache_of_another_layout_is_refused() -> None:
    with pytest.raises(AnalysisError, match=r"past_key_values\.1\.key"):
        compact_cache(decoder(cache=("batch", "past", "2", "3")))
