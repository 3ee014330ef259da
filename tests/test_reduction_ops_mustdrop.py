"""MustDrop's thresholds as operators, against its definition in numpy (arXiv 2411.10803)."""

from typing import Any

import numpy as np
import pytest
from cut_oracle import Array, Call, above, asked, calls, ranked, scored, selected, visible
from hypothesis import assume, given
from hypothesis import strategies as st
from test_ops import CHOICES, HEADS, Heads, attention, is_clear, run

from vtr_export import ops

CLEAR = 1e-4  # a ratio further from its threshold is the same side of it in fp32
SAFE = 9.0  # above what can be scored, of which fp32 tells few apart
SHARES = st.sampled_from([0.0, 0.02, 0.1, 0.2, 0.4, 1.0])


def ragged(choice: ops.Choice) -> ops.Choice:
    return ops.Choice(choice.query, choice.heads, choice.rank, True, choice.softcap)


def is_told(score: Array, keep: int) -> bool:
    """Whether fp32 must choose as double precision does; of equals the lower index."""
    order = np.sort(score)[::-1]
    return is_clear(score, keep) or bool(order[keep - 1] == order[keep] >= SAFE)


def fed(call: Call, query: Array, keys: Array) -> dict[str, Any]:
    mask = visible(call.padding, call.current.shape[1])
    return {"query": query, "keys": keys, "mask": mask, "vision_index": call.vision}


def drawn(call: Call, data: st.DataObject) -> Array:
    """Which vision tokens are protected; pads may be said to be."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    share: float = data.draw(st.sampled_from([0.0, 0.3]))
    return np.asarray(rng.random(call.vision.shape) < share)


@given(calls(st.integers(0, 9)), HEADS, CHOICES, SHARES, SHARES, st.data())
def test_a_token_goes_that_is_below_both_thresholds(
    call: Call, heads: Heads, choice: ops.Choice, whole: float, single: float, data: st.DataObject
) -> None:
    """Each row by its own, at most its budget; the widest row says how wide the rest is."""
    query, keys, scale = attention(call, heads, data.draw(st.integers(0, 99)), "f4")
    protected, counts = drawn(call, data), call.counts
    score, nearest = above(call, asked(call, query, keys, scale, choice), whole, single, protected)
    assume(nearest > CLEAR)
    budget = np.array([data.draw(st.integers(int(n) // 2, int(n))) for n in counts])
    stays = np.minimum((score >= 1).sum(1), budget)
    assume(all(is_told(row, int(k)) for row, k in zip(score, stays, strict=True)))
    hidden, indices, vision = run(
        "VtrThresholdPrune",
        ragged(choice),
        **fed(call, query, keys),
        keep=np.array([call.sizes[3]]),
        budget=budget,
        protected=protected,
        hidden=call.hidden(),
        scale=scale,
        whole=whole,
        single=single,
    )
    width = int(stays.max())
    rows = [ranked(row, width, int(k)) for row, k in zip(score, stays, strict=True)]
    expected = selected(call, rows)
    assert indices.tolist() == expected[0].tolist()
    assert vision.tolist() == expected[1].tolist()
    assert (hidden[:, :, 0] == indices).all()


@given(calls(), HEADS, CHOICES, st.data())
def test_protected_tokens_come_before_all_others(
    call: Call, heads: Heads, choice: ops.Choice, data: st.DataObject
) -> None:
    query, keys, scale = attention(call, heads, data.draw(st.integers(0, 99)), "f4")
    keep, protected = data.draw(st.integers(0, call.sizes[3])), drawn(call, data)
    budget = np.minimum(call.counts, keep)
    score = scored(call, query, keys, scale, choice)
    score[protected & (score > -1.5)] = SAFE
    assume(all(is_told(row, int(k)) for row, k in zip(score, budget, strict=True)))
    _, indices, vision = run(
        "VtrProtectPrune",
        ragged(choice),
        **fed(call, query, keys),
        keep=np.array([keep]),
        budget=budget,
        protected=protected,
        hidden=call.hidden(),
        scale=scale,
    )
    rows = [ranked(row, keep, int(k)) for row, k in zip(score, budget, strict=True)]
    expected = selected(call, rows)
    assert indices.tolist() == expected[0].tolist()
    assert vision.tolist() == expected[1].tolist()


def test_what_is_no_number_is_not_below() -> None:
    """And nothing is, where a threshold is 0."""
    call = Call(np.ones((1, 0), np.int64), np.ones((1, 4), np.int64), np.array([[0, 1, 2]]))
    query, keys, scale = attention(call, Heads(1, 1, 4), 0, "f4")
    feeds = {**fed(call, query, keys), "protected": np.zeros((1, 3), bool), "hidden": call.hidden()}
    common: dict[str, Any] = {"scale": scale, "single": 0.5}
    (score,) = run("VtrEvidence", **{**feeds, "query": query * np.nan}, **common, whole=0.9)
    assert score.tolist() == [[1, 1, 1]]
    (score,) = run("VtrEvidence", **feeds, **common, whole=0.0)
    assert (score >= 1).all()
    (score,) = run("VtrEvidence", **feeds, **common, whole=1.0)
    assert (score < 1).any()


@pytest.mark.parametrize("name", ["VtrThresholdPrune", "VtrProtectPrune"])
def test_a_decode_step_has_nothing_to_drop(name: str) -> None:
    call = Call(np.ones((2, 3), np.int64), np.ones((2, 1), np.int64), np.zeros((2, 0), np.int64))
    query, keys, scale = attention(call, Heads(2, 2, 4), 0, "f4")
    said: dict[str, Any] = {"whole": 0.5, "single": 0.5} if "Threshold" in name else {}
    hidden, indices, vision = run(
        name,
        ragged(ops.Choice("text")),
        **fed(call, query, keys),
        keep=np.array([0]),
        budget=np.zeros(2, np.int64),
        protected=np.zeros((2, 0), bool),
        hidden=call.hidden(),
        scale=scale,
        **said,
    )
    assert (indices.tolist(), vision.shape) == ([[0], [0]], (2, 0))
    assert (hidden == call.hidden()).all()


@given(calls(), st.integers(0, 99))
def test_marks_follow_their_tokens(call: Call, seed: int) -> None:
    batch, _, length, tokens = call.sizes
    rng = np.random.default_rng(seed)
    real = np.take_along_axis(call.current, call.vision, 1)
    marked = rng.integers(0, 2, (batch, tokens)) * real
    (marks,) = run("VtrMark", vision_index=call.vision, marked=marked, hidden=call.hidden())
    expected = np.zeros((batch, length), np.int64)
    for b, e in zip(*np.nonzero(marked), strict=True):
        expected[b, call.vision[b, e]] = 1
    assert marks.tolist() == expected.tolist()
    (found,) = run("VtrMarked", marks=marks, vision_index=call.vision)
    assert (found == (marked == 1)).all()
