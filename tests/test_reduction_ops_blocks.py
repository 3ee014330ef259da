"""What FitPrune and FiCoCo-L rank by and merge, against their definitions in numpy."""

import block_oracle
import numpy as np
from cut_oracle import Array, Call, calls, ranked, selected, visible
from hypothesis import assume, given
from hypothesis import strategies as st
from test_ops import HEADS, Heads, attention, run

from vtr_export import ops

CHOICES = st.builds(
    ops.Choice,
    st.sampled_from(["last", "text"]),
    st.sampled_from(["mean", "max"]),
    softcap=st.sampled_from([None, 2.0]),
    rule=st.sampled_from(["attention", "self_cross", "redundancy"]),
)
SEEDS = st.integers(0, 99)
CLEAR = 1e-6  # a gap that fp32 does not turn round
DIRECT, NEAREST = 0.25, 2  # of a merge


def asked(call: Call, heads: Heads, seed: int) -> dict[str, Array | float]:
    query, keys, scale = attention(call, heads, seed, "f4")
    mask = visible(call.padding, call.current.shape[1])
    told = {"mask": mask, "vision_index": call.vision, "hidden": call.hidden()}
    return {"query": query, "keys": keys, "scale": scale, **told}


def scores(call: Call, said: dict[str, Array | float], choice: ops.Choice) -> tuple[Array, Array]:
    """By the graph and by the definition."""
    by_vision, by_text, real, asks = run("VtrVisionBlocks", choice, **said)
    told = {"by_vision": by_vision, "by_text": by_text, "real": real, "asks": asks}
    (score,) = run(ops.BLOCK_SCORES[choice.rule], choice, **told)
    query, keys, scale = (said[name] for name in ("query", "keys", "scale"))
    return score, block_oracle.block_scores(call, query, keys, scale, choice)


@given(calls(), HEADS, CHOICES, SEEDS)
def test_a_rule_ranks_as_its_paper_says(
    call: Call, heads: Heads, choice: ops.Choice, seed: int
) -> None:
    score, expected = scores(call, asked(call, heads, seed), choice)
    assert score.dtype == np.float32
    assert score.shape == expected.shape
    np.testing.assert_allclose(score, expected, atol=3e-6)


@given(calls(st.integers(1, 6)), HEADS, CHOICES, SEEDS)
def test_what_pads_and_silent_rows_hold_is_never_read(
    call: Call, heads: Heads, choice: ops.Choice, seed: int
) -> None:
    """NaN there changes nothing; NaN in a row that asks makes every real token the worst."""
    said = asked(call, heads, seed)
    clean, _ = scores(call, said, choice)
    query, keys = np.array(said["query"]), np.array(said["keys"])
    silent = call.current == 0
    query.swapaxes(1, 2)[silent] = np.nan
    keys.swapaxes(1, 2)[call.padding == 0] = np.nan
    told = said | {"query": query, "keys": keys}
    assert (scores(call, told, choice)[0] == clean).all()
    query[0, :, -1] = np.nan
    poisoned, _ = scores(call, told | {"query": query}, choice)
    real = np.take_along_axis(call.current, call.vision, 1) == 1
    assert (poisoned[0][real[0]] == -1).all()
    assert (poisoned[1:] == clean[1:]).all()


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Array, Array, list[bool], list[bool], int]:
    """Correlations [V,V] with ties, who is real, who stays, and how many receive."""
    tokens = draw(st.integers(1, 7))
    flags = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    levels = np.random.default_rng(draw(SEEDS)).integers(0, 4, (tokens, tokens))
    real, stays = draw(flags), draw(flags)
    correlation = (levels / 4).astype(np.float32)
    return correlation, levels, real, stays, draw(st.integers(1, 3))


def shares_of(correlation: Array, gives: Array, takes: Array, nearest: int) -> Array:
    (shares,) = run(
        "VtrShares", correlation=correlation[None], gives=gives, takes=takes, nearest=nearest
    )
    return np.asarray(shares[0])


@given(blocks())
def test_a_dropped_token_is_divided_among_its_nearest_and_nothing_is_lost(
    drawn: tuple[Array, Array, list[bool], list[bool], int],
) -> None:
    """Ties go to the lower index; who is no pad and stays receives; the rest of the row is 0."""
    correlation, _, real, stays, nearest = drawn
    gives = np.array([[r and not s for r, s in zip(real, stays, strict=True)]])
    takes = np.array([[r and s for r, s in zip(real, stays, strict=True)]])
    shares = shares_of(correlation, gives, takes, nearest)
    kept = [e for e, one in enumerate(real) if one]
    own = correlation[np.ix_(kept, kept)].astype(float)
    expected = np.zeros_like(shares)
    expected[np.ix_(kept, kept)] = block_oracle.divided(own, [stays[e] for e in kept], nearest)
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    assert ((shares > 0).sum(1) <= nearest).all()
    assert (shares[:, ~takes[0]] == 0).all()
    sums = shares.sum(1)
    assert np.isclose(sums, 0, atol=1e-6).all() | np.isclose(sums[sums > 0], 1, atol=1e-6).all()


@given(blocks(), st.sampled_from(["f4", "f2"]), SEEDS)
def test_a_merge_keeps_what_all_weigh_together(
    drawn: tuple[Array, Array, list[bool], list[bool], int], dtype: str, seed: int
) -> None:
    """Sizes times rows sum to the same; who receives nothing keeps its bits; the order is free."""
    correlation, _, _, stays, nearest = drawn
    takes = np.array([stays])
    gives, rng = ~takes, np.random.default_rng(seed)
    shares = shares_of(correlation, gives, takes, nearest)
    rows = rng.normal(size=(1, len(stays), 3)).astype(dtype)
    told = {"shares": shares[None], "gives": gives, "stream": rows}
    (merged,) = run("VtrMergeShares", **told)
    assert merged.dtype == rows.dtype
    np.testing.assert_allclose(
        merged[0], block_oracle.merged(rows[0], shares), atol=1e-5 if dtype == "f4" else 4e-3
    )
    size = 1 + shares.sum(0)
    if dtype == "f4":
        given_away = shares.sum(1) @ rows[0]
        whole = (size[:, None] * merged[0])[takes[0]].sum(0)
        np.testing.assert_allclose(whole, rows[0][takes[0]].sum(0) + given_away, atol=1e-4)
    alone = size == 1
    assert (merged[0][alone] == rows[0][alone]).all()
    order = rng.permutation(len(stays))
    turned = {"shares": shares[order][:, order][None], "gives": gives[:, order]}
    (again,) = run("VtrMergeShares", stream=rows[:, order], **turned)
    np.testing.assert_allclose(again[0], merged[0][order], atol=1e-5 if dtype == "f4" else 4e-3)


@given(calls(st.integers(0, 6)), HEADS, CHOICES, st.data())
def test_a_cut_that_merges_ranks_selects_and_divides(
    call: Call, heads: Heads, choice: ops.Choice, data: st.DataObject
) -> None:
    said = asked(call, heads, data.draw(SEEDS))
    keep = data.draw(st.integers(0, call.sizes[3]))
    budget = np.maximum(np.minimum(call.counts, keep), keep - (call.sizes[3] - call.counts))
    query, keys, scale = (said[name] for name in ("query", "keys", "scale"))
    score = block_oracle.block_scores(call, query, keys, scale, choice)
    chosen = [ranked(row, keep, int(k)) for row, k in zip(score, budget, strict=True)]
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(*call.current.shape, 3)).astype(np.float32)
    expected = hidden.astype(float)
    for b in range(len(hidden)):
        row = np.sort(score[b])[::-1]
        k = int(budget[b])
        assume(k in (0, len(row)) or row[k - 1] - row[k] > CLEAR)
        found = block_oracle.given(call, b, query, keys, scale, choice)
        stays = [c in {int(call.vision[b, e]) for e in chosen[b]} for c in found.columns]
        correlation = block_oracle.correlations(found, DIRECT)
        assume(block_oracle.clear(correlation, stays, NEAREST) > CLEAR)
        shares = block_oracle.divided(correlation, stays, NEAREST)
        expected[b, found.columns] = block_oracle.merged(hidden[b, found.columns], shares)
    columns, places = selected(call, chosen)
    merge = {"direct": DIRECT, "nearest": NEAREST}
    told = {**said, "hidden": hidden, "keep": np.array([keep]), "budget": budget, **merge}
    kept_hidden, indices, vision = run("VtrCorrelatePrune", choice, **told)
    assert indices.tolist() == columns.tolist()
    assert vision.tolist() == places.tolist()
    wanted = np.stack([row[at] for row, at in zip(expected, columns, strict=True)])
    np.testing.assert_allclose(kept_hidden, wanted, atol=1e-4)
    blocks = run("VtrVisionBlocks", choice, **said)
    known = dict(zip(("by_vision", "by_text", "real", "asks"), blocks, strict=True))
    known |= {"vision_index": call.vision, "indices": indices, "hidden": hidden}
    (forced,) = run("VtrMergeCorrelated", choice, **known, **merge)
    assert (forced == kept_hidden).all()
    dropped = {name: told[name] for name in told if name not in merge}
    plain, again, _ = run("VtrScoredPrune", choice, **dropped)
    assert (again == indices).all()
    assert (plain == np.stack([r[at] for r, at in zip(hidden, indices, strict=True)])).all()


@given(calls(), st.integers(1, 3), SEEDS)
def test_rows_and_survivors_are_found_by_column(call: Call, width: int, seed: int) -> None:
    batch, _, length, tokens = call.sizes
    rng = np.random.default_rng(seed)
    stream = rng.normal(size=(batch, 2, length, width)).astype(np.float32)
    (rows,) = run("VtrNarrowRows", stream=stream, indices=call.vision)
    assert (rows == np.stack([s[:, at] for s, at in zip(stream, call.vision, strict=True)])).all()
    indices = np.sort(rng.integers(0, length, (batch, length // 2)))
    hidden = call.hidden()
    (survives,) = run("VtrSurvives", vision_index=call.vision, indices=indices, hidden=hidden)
    assert survives.tolist() == [
        [int(c) in at for c in row] for row, at in zip(call.vision, indices.tolist(), strict=True)
    ]
    replaced = -1 - rng.random((batch, tokens, 2)).astype(np.float32)
    told = {"hidden": hidden, "vision_index": call.vision, "replaced": replaced}
    (narrowed,) = run("VtrNarrowReplaced", indices=indices, **told)
    expected = hidden.copy()
    np.put_along_axis(expected, call.vision[..., None], replaced, 1)
    assert (narrowed == np.stack([r[at] for r, at in zip(expected, indices, strict=True)])).all()
