"""Every operator we own: checked, run in ONNX Runtime, and compared with its definition in numpy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx_ir as ir
import onnxruntime
import pytest
from cut_oracle import Array, Call, asking, calls, ranked, scored, selected, visible
from hypothesis import assume, given
from hypothesis import strategies as st

from vtr_export import ops
from vtr_export.ops.functions import folder, load
from vtr_export.ops.prune import INPUTS
from vtr_export.ops.prune import OUTPUTS as PRUNE_OUTPUTS

NAMES = sorted(path.stem for path in folder().glob("*.onnxtxt"))
REFUSED = {"NonZero", "Compress", "Unique", "Scan", "If", "Loop"}  # by TensorRT, or in two profiles
LOOPS = {"VtrFarthest", "VtrThinOut"}  # greedy: a step depends on the one before
FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
OUTPUTS: dict[str, list[tuple[ir.DataType | None, int]]] = {  # None: the type of ``hidden``
    "VtrAbove": [(INT64, 1), (INT64, 1)],
    "VtrAlive": [(INT64, 2)],
    "VtrAlso": [(INT64, 2)],
    "VtrAppend": [(None, 3)],
    "VtrAscending": [(INT64, 2)],
    "VtrAskedBy": [(FLOAT, 2)],
    "VtrBestWindows": [(BOOL, 2)],
    "VtrBudget": [(INT64, 1)],
    "VtrCacheColumns": [(INT64, 2)],
    "VtrCacheMask": [(INT64, 2)],
    "VtrCausalMask": [(BOOL, 4)],
    "VtrClassAttention": [(FLOAT, 3)],
    "VtrClassRedundancy": [(FLOAT, 2), (FLOAT, 2)],
    "VtrClusterCount": [(INT64, 1), (INT64, 1)],
    "VtrClusters": [(INT64, 2), (INT64, 2)],
    "VtrColumns": [(INT64, 2)],
    "VtrCorrelatePrune": [(None, 3), (INT64, 2), (INT64, 2)],
    "VtrCorrelation": [(FLOAT, 3)],
    "VtrCosine": [(FLOAT, 3)],
    "VtrCountTrue": [(FLOAT, 2)],
    "VtrCrossMask": [(BOOL, 4)],
    "VtrCrossRows": [(BOOL, 3)],
    "VtrDistances": [(FLOAT, 3)],
    "VtrEvidence": [(FLOAT, 2)],
    "VtrFarthest": [(INT64, 2)],
    "VtrGroupMask": [(BOOL, 4)],
    "VtrHeadLogits": [(FLOAT, 3)],
    "VtrHeadsMax": [(FLOAT, 3)],
    "VtrHeadsMean": [(FLOAT, 3)],
    "VtrKeyRedundancy": [(FLOAT, 2), (FLOAT, 2)],
    "VtrLikeWindows": [(BOOL, 2), (INT64, 1)],
    "VtrLikeness": [(FLOAT, 2)],
    "VtrMark": [(INT64, 2)],
    "VtrMarked": [(BOOL, 2)],
    "VtrMerge": [(None, 3)],
    "VtrMergeCorrelated": [(None, 3)],
    "VtrMergeNearest": [(None, 3)],
    "VtrMergeShares": [(None, 3)],
    "VtrMergeWindows": [(None, 3), (INT64, 2), (INT64, 1)],
    "VtrNarrow": [(None, 3)],
    "VtrNarrowCache": [(None, 4)],
    "VtrNarrowReplaced": [(None, 3)],
    "VtrNarrowRows": [(None, 4)],
    "VtrNearestSum": [(None, 3)],
    "VtrOutliers": [(INT64, 1)],
    "VtrPack": [(INT64, 2)],
    "VtrPackChosen": [(INT64, 2), (INT64, 1)],
    "VtrPackRows": [(FLOAT, 2)],
    "VtrPixelShuffle": [(None, 3)],
    "VtrPlace": [(INT64, 2), (INT64, 2)],
    "VtrPoolMax": [(None, 3)],
    "VtrPoolMean": [(None, 3)],
    "VtrPoolPatches": [(FLOAT, 2)],
    "VtrProbability": [(FLOAT, 4)],
    "VtrProjectWide": [(None, 3)],
    "VtrProtect": [(FLOAT, 2)],
    "VtrProtectPrune": [(None, 3), (INT64, 2), (INT64, 2)],
    "VtrRankJoint": [(INT64, 2)],
    "VtrRankPerImage": [(INT64, 2)],
    "VtrRankRagged": [(INT64, 2)],
    "VtrRankable": [(FLOAT, 2)],
    "VtrRaterPrune": [(None, 3), (INT64, 2), (INT64, 2)],
    "VtrRaterRecyclePrune": [(None, 3), (INT64, 2), (INT64, 2), (INT64, 2)],
    "VtrRaterScore": [(FLOAT, 2)],
    "VtrRaters": [(FLOAT, 2)],
    "VtrRealRows": [(BOOL, 2), (BOOL, 4)],
    "VtrReceivedAttention": [(FLOAT, 3)],
    "VtrRecycle": [(INT64, 2), (INT64, 2), (INT64, 2)],
    "VtrRecyclePrune": [(None, 3), (INT64, 2), (INT64, 2), (INT64, 2)],
    "VtrRedundancy": [(FLOAT, 2)],
    "VtrResizeGrid": [(None, 3)],
    "VtrRestSum": [(None, 3)],
    "VtrRoute": [(INT64, 2)],
    "VtrRowShares": [(FLOAT, 3), (FLOAT, 2)],
    "VtrRowsLast": [(INT64, 1)],
    "VtrRowsText": [(INT64, 1)],
    "VtrScales": [(None, 4)],
    "VtrScore": [(FLOAT, 2)],
    "VtrScoredPrune": [(None, 3), (INT64, 2), (INT64, 2)],
    "VtrSeen": [(INT64, 2)],
    "VtrSelect": [(INT64, 2), (INT64, 2)],
    "VtrSelectRagged": [(INT64, 2), (INT64, 2)],
    "VtrSelfCross": [(FLOAT, 2)],
    "VtrSelfPreserve": [(None, 3)],
    "VtrShares": [(FLOAT, 3)],
    "VtrSoftcap": [(FLOAT, 4)],
    "VtrSources": [(INT64, 2)],
    "VtrSplitTokens": [(INT64, 2), (INT64, 2)],
    "VtrSpread": [(INT64, 2), (INT64, 1)],
    "VtrSurvives": [(BOOL, 2)],
    "VtrTail": [(None, 3)],
    "VtrTextMean": [(FLOAT, 2)],
    "VtrThinOut": [(INT64, 2), (INT64, 1)],
    "VtrThresholdPrune": [(None, 3), (INT64, 2), (INT64, 2)],
    "VtrTokenKeys": [(FLOAT, 3)],
    "VtrTopFlags": [(BOOL, 2)],
    "VtrTopKPrune": [(None, 3), (INT64, 2), (INT64, 2)],
    "VtrTopOrder": [(INT64, 2)],
    "VtrTopTokens": [(INT64, 2)],
    "VtrUnit": [(FLOAT, 3)],
    "VtrVisionBlocks": [(FLOAT, 3), (FLOAT, 3), (BOOL, 2), (BOOL, 2)],
    "VtrVisionCount": [(INT64, 1)],
    "VtrWeighUnits": [(FLOAT, 2)],
    "VtrWeightLast": [(FLOAT, 2)],
    "VtrWeightText": [(FLOAT, 2)],
    "VtrWholeWidth": [(None, 4)],
    "VtrWindowPenalty": [(FLOAT, 2)],
    "VtrWindows": [(FLOAT, 4)],
}
Signature = tuple[tuple[str, Any, int], ...]
DEFAULT = ops.Choice()


def build(
    name: str, signature: Signature, choice: ops.Choice, attributes: Mapping[str, Any]
) -> Any:
    """A checked model that calls ``name`` once, every dimension open."""
    inputs = [
        ir.val(key, shape=[f"{key}_{axis}" for axis in range(rank)], type=ir.TensorType(dtype))
        for key, dtype, rank in signature
    ]
    data = next((v for v in reversed(inputs) if v.name in ("hidden", "stream")), None)
    node = ir.node(name, inputs, attributes, domain="vtr", num_outputs=len(OUTPUTS[name]))
    for number, (value, (dtype, rank)) in enumerate(zip(node.outputs, OUTPUTS[name], strict=True)):
        wide = data is not None and dtype is None
        value.name = f"output_{number}"
        value.type = data.type if wide else ir.TensorType(dtype)
        value.shape = ir.Shape([None] * (len(data.shape) if wide else rank))
    imports = {"": 24, ops.DOMAIN: 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports=imports, name=name)
    model = ir.Model(graph, ir_version=11)
    ops.declare(model, name, choice)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


@cache
def session(
    name: str, signature: Signature, choice: ops.Choice, attributes: tuple[tuple[str, Any], ...]
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    proto = build(name, signature, choice, dict(attributes))
    return onnxruntime.InferenceSession(proto.SerializeToString(), options)


def run(name: str, choice: ops.Choice = DEFAULT, **given: Any) -> list[Array]:
    """Outputs of the operator in ONNX Runtime; numbers are attributes, arrays are inputs."""
    feeds = {k: v for k, v in given.items() if isinstance(v, np.ndarray)}
    attributes = tuple((k, v) for k, v in given.items() if k not in feeds and v is not None)
    order = [value.name or "" for value in load(name, choice).inputs]
    signature = tuple((k, ir.DataType.from_numpy(feeds[k].dtype), feeds[k].ndim) for k in order)
    return list(session(name, signature, choice, attributes).run(None, feeds))


# --- each file ---


def test_every_operator_is_tested() -> None:
    assert sorted(OUTPUTS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_operator_is_called_as_its_file_and_as_nothing_else(name: str) -> None:
    function = load(name, DEFAULT)
    assert (function.domain, function.name) == (ops.DOMAIN, name)
    assert not onnx.defs.has(name)  # TensorRT matches names of built-in operators in any domain
    used = {node.op_type for node in function if node.domain == ""}
    assert used & REFUSED == ({"Loop"} if name in LOOPS else set())
    assert all(onnx.defs.has(op) for op in used)
    values = [v.name for v in (*function.inputs, *(o for n in function for o in n.outputs))]
    assert "_" not in values
    assert len(values) == len(set(values))


def test_declaring_twice_is_once_and_brings_all_that_is_called() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["": 24]> g (float[1] x) => (float[1] y) { y = Abs(x) }'
    )
    for _ in range(2):
        ops.declare(model, "VtrTopKPrune", ops.Choice("text", "max", "per_image"))
    names = sorted(name for _, name, _ in model.functions)
    used = {node.op_type for f in model.functions.values() for node in f if node.domain == "vtr"}
    assert used < set(names)
    assert {"VtrWeightText", "VtrRowsText", "VtrHeadsMax", "VtrRankPerImage"} < set(names)


def test_no_plugin_is_named_where_logits_are_capped() -> None:
    """A kernel would rank by logits that nobody bent."""
    said = {attribute.name for attribute in ops.prune_attributes(0.5, ops.Choice(softcap=30.0))}
    assert said == {"scale", "query", "heads", "rank"}


@pytest.mark.parametrize("choice", [DEFAULT, ops.Choice("text", "max", "per_image")])
def test_the_composite_is_declared_with_what_its_node_says(choice: ops.Choice) -> None:
    """A function lists every attribute of its calls, whether or not its body reads them."""
    function = load(ops.PRUNE, choice)
    said = ops.prune_attributes(0.5, choice)
    assert sorted(function.attributes) == sorted(attribute.name for attribute in said)
    assert [value.name for value in function.inputs] == list(INPUTS)
    assert [value.name for value in function.outputs] == list(PRUNE_OUTPUTS)
    values = {attribute.name: attribute.value for attribute in said}
    assert ops.Choice(*(values[name] for name in ("query", "heads", "rank"))) == choice
    assert [INPUTS[i] for i in values["tensorrt_plugin_shape_input_indices"]] == ["keep"]
    read = {
        attribute.ref_attr_name
        for node in function
        for attribute in node.attributes.values()
        if attribute.is_ref()
    }
    assert read == {"scale"}


# --- lengths, masks, streams ---


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=4),
    st.integers(0, 700),
    st.integers(1, 600),
    st.booleans(),
)
def test_budget_is_an_exact_share(counts: list[int], keep: int, per: int, ceil: bool) -> None:
    (actual,) = run(
        "VtrBudget",
        count=np.array(counts),
        keep=np.array([keep]),
        per=np.array([per]),
        ceil=int(ceil),
    )
    rounded = [(math.ceil if ceil else math.floor)(Fraction(count * keep, per)) for count in counts]
    assert actual.tolist() == [min(pair) for pair in zip(rounded, counts, strict=True)]


@given(calls())
def test_a_row_sees_real_keys_up_to_itself_and_always_itself(call: Call) -> None:
    (mask,) = run("VtrCausalMask", padding=call.padding, hidden=call.hidden())
    assert (mask == visible(call.padding, call.current.shape[1])).all()
    assert (run("VtrSeen", mask=mask)[0] == call.padding).all()  # the last column is always real
    (count,) = run(
        "VtrVisionCount", padding=call.padding, vision_index=call.vision, hidden=call.hidden()
    )
    assert count.tolist() == call.counts.tolist()


@given(calls(), st.data())
def test_tokens_of_a_group_see_each_other_too(call: Call, data: st.DataObject) -> None:
    batch, _, length, _ = call.sizes
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    groups = rng.integers(0, 3, (batch, length)) * call.current
    rows = data.draw(st.integers(1, length))
    (mask,) = run("VtrGroupMask", padding=call.padding, row_groups=groups[:, -rows:], groups=groups)
    expected = visible(call.padding, rows, groups)
    assert (mask == expected).all()
    assert (run("VtrSeen", mask=mask)[0] == call.padding).all()


@pytest.mark.parametrize(("past", "new"), [(1, 0), (1, 3), (4, 0), (3, 2)])
def test_a_row_without_a_vision_key_sees_nobodys_and_does_not_count(past: int, new: int) -> None:
    rng = np.random.default_rng(past + new)
    old = rng.integers(0, 2, (3, past)) * [[0], [1], [1]]
    old[:, 0] = 0  # of nobody
    seen = rng.integers(0, 2, (3, 5, new)).astype(bool) & ~np.eye(3, dtype=bool)[:, :1, None]
    asked = rng.integers(0, 2, (3, 5))
    keys = np.concatenate((np.repeat(old[:, None] != 0, 5, axis=1), seen), axis=2)
    (mask,) = run("VtrCrossMask", past=old, seen=seen)
    (counted,) = run("VtrCrossRows", past=old, seen=seen, rows=asked)
    sees = keys.any(-1)
    assert mask.shape == (3, 1, 5, past + new)
    assert (mask[:, 0, :, 1:] == keys[:, :, 1:]).all()
    assert (mask[:, 0, :, 0] == ~sees).all()
    assert (counted[..., 0] == (sees & (asked != 0))).all()
    assert not sees[0].any()


def test_a_softcap_bends_what_is_large_and_nothing_else() -> None:
    logits = np.linspace(-90, 90, 24, dtype=np.float32).reshape(1, 2, 3, 4)
    (capped,) = run("VtrSoftcap", logits=logits, softcap=30.0)
    np.testing.assert_allclose(capped, 30 * np.tanh(logits.astype(float) / 30), rtol=1e-6)


@given(calls())
def test_columns_count_every_row(call: Call) -> None:
    hidden = call.hidden()
    (actual,) = run("VtrColumns", hidden=hidden)
    assert actual.tolist() == [list(range(hidden.shape[1]))] * hidden.shape[0]


@given(calls())
def test_packed_positions_count_the_real_tokens_before(call: Call) -> None:
    (actual,) = run("VtrPack", padding=call.padding, hidden=call.hidden())
    past, whole = call.past.shape[1], call.padding
    expected = [
        [max(0, int(row[: past + i + 1].sum()) - 1) for i in range(call.current.shape[1])]
        for row in whole
    ]
    assert actual.tolist() == expected


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(0, 6),
    st.sampled_from([(), (3,), (2, 3)]),
    st.sampled_from(["f4", "f2", "i8"]),
    st.integers(0, 99),
)
def test_streams_are_gathered_row_by_row(
    batch: int, length: int, kept: int, rest: tuple[int, ...], dtype: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    stream = rng.normal(size=(batch, length, *rest)).astype(dtype)
    indices = rng.integers(0, length, (batch, kept))
    (actual,) = run("VtrNarrow", stream=stream, indices=indices)
    assert (actual == np.stack([row[at] for row, at in zip(stream, indices, strict=True)])).all()
    (tail,) = run("VtrTail", stream=stream, count=np.array([min(kept, length)]))
    assert tail.tolist() == stream[:, length - min(kept, length) :].tolist()


@given(
    st.integers(1, 2), st.integers(1, 5), st.integers(0, 3), st.integers(1, 5), st.integers(0, 99)
)
def test_heads_are_reduced_and_a_nan_in_one_is_never_lost(
    batch: int, heads: int, rows: int, total: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    probability = rng.random((batch, heads, rows, total), np.float32)
    probability[rng.random(probability.shape) < 0.1] = np.nan
    (mean,), (largest,) = (
        run(name, probability=probability) for name in ("VtrHeadsMean", "VtrHeadsMax")
    )
    np.testing.assert_allclose(mean, probability.mean(1), atol=1e-6)
    np.testing.assert_array_equal(largest, probability.max(1))


@given(calls())
def test_query_rows_are_the_last_or_the_text_behind_the_last_vision_token(call: Call) -> None:
    batch, _, length, tokens = call.sizes
    common = {"vision_index": call.vision, "hidden": call.hidden()}
    for query, name in (("last", "Last"), ("text", "Text")):
        (count,) = run(f"VtrRows{name}", **common)
        if not tokens:
            assert count.tolist() == [0]
        (weight,) = run(f"VtrWeight{name}", count=count, seen=call.padding, **common)
        rows = [asking(call, b, query) if tokens else [] for b in range(batch)]
        start = length - int(count[0])
        expected = [[(i in row) / max(1, len(row)) for i in range(start, length)] for row in rows]
        np.testing.assert_allclose(weight, np.array(expected).reshape(batch, -1), rtol=1e-6)
        assert all(i >= start for row in rows for i in row)


# --- score, select, prune ---


@dataclass(frozen=True)
class Heads:
    kv: int
    group: int
    width: int


HEADS = st.builds(Heads, st.integers(1, 2), st.integers(1, 3), st.sampled_from([2, 4, 8]))
CHOICES = st.builds(
    ops.Choice,
    st.sampled_from(["last", "text"]),
    st.sampled_from(["mean", "max"]),
    softcap=st.sampled_from([None, 2.0]),
)


def attention(call: Call, heads: Heads, seed: int, dtype: Any) -> tuple[Array, Array, float]:
    """Query, keys and scale of a random layer."""
    batch, past, length, _ = call.sizes
    rng = np.random.default_rng(seed)
    query = 2 * rng.normal(size=(batch, heads.kv * heads.group, length, heads.width))
    keys = 2 * rng.normal(size=(batch, heads.kv, past + length, heads.width))
    return query.astype(dtype), keys.astype(dtype), float(np.float32(heads.width**-0.5))


@given(calls(), HEADS, CHOICES, st.sampled_from(["f4", "f2"]), st.integers(0, 99))
def test_a_score_is_the_probability_that_query_rows_give(
    call: Call, heads: Heads, choice: ops.Choice, dtype: str, seed: int
) -> None:
    query, keys, scale = attention(call, heads, seed, dtype)
    mask = visible(call.padding, call.current.shape[1])
    (score,) = run(
        "VtrScore",
        choice,
        query=query,
        keys=keys,
        mask=mask,
        vision_index=call.vision,
        hidden=call.hidden(dtype),
        scale=scale,
    )
    assert score.dtype == np.float32
    np.testing.assert_allclose(score, scored(call, query, keys, scale, choice), atol=2e-6)


@given(calls(st.integers(1, 6)), HEADS, CHOICES, st.integers(0, 99))
def test_nan_counts_below_every_number_and_above_pads_and_spreads_no_further(
    call: Call, heads: Heads, choice: ops.Choice, seed: int
) -> None:
    query, keys, scale = attention(call, heads, seed, "f4")
    rng = np.random.default_rng(seed)
    asked = asking(call, 0, choice.query)
    silent = [i for i in range(call.current.shape[1]) if i not in asked]
    query[0, :, silent] = np.nan
    keys[0, :, call.padding[0] == 0] = np.nan
    feeds = {
        "mask": visible(call.padding, call.current.shape[1]),
        "vision_index": call.vision,
        "hidden": call.hidden(),
    }
    for poisoned in (False, True):
        if poisoned:
            query[0, rng.integers(query.shape[1]), rng.choice(asked)] = np.nan
        (score,) = run("VtrScore", choice, query=query, keys=keys, scale=scale, **feeds)
        expected = scored(call, query, keys, scale, choice)
        np.testing.assert_allclose(score, expected, atol=2e-6)
        real = np.take_along_axis(call.current, call.vision, 1)[0] == 1
        assert (score[0][real] == -1).all() == (poisoned or not real.any())


@given(calls(st.integers(0, 9)), st.data())
def test_select_keeps_each_rows_best_and_all_text(call: Call, data: st.DataObject) -> None:
    batch, _, _, tokens = call.sizes
    share, ceil = Fraction(data.draw(st.integers(0, 5)), 5), data.draw(st.booleans())
    rounded = math.ceil if ceil else math.floor
    keep, budget = rounded(tokens * share), [rounded(int(v) * share) for v in call.counts]
    levels = np.array(
        data.draw(st.lists(st.integers(0, 3), min_size=batch * tokens, max_size=batch * tokens))
    )
    score = levels.reshape(batch, tokens).astype(np.float32) / 4
    score[np.take_along_axis(call.current, call.vision, 1) == 0] = -2
    feeds = {"score": score, "keep": np.array([keep]), "budget": np.array(budget)}
    indices, vision = run("VtrSelect", vision_index=call.vision, hidden=call.hidden(), **feeds)
    expected = [ranked(row, keep, k) for row, k in zip(score, budget, strict=True)]
    assert run("VtrRankJoint", **feeds)[0].tolist() == expected
    for actual, wanted in zip((indices, vision), selected(call, expected), strict=True):
        assert actual.tolist() == wanted.tolist()


@given(st.integers(1, 4), st.integers(0, 3), st.data())
def test_each_image_keeps_its_own_best(size: int, images: int, data: st.DataObject) -> None:
    call = data.draw(calls(st.just(size * images), size))
    share = data.draw(st.integers(0, size))
    score = (
        np.random.default_rng(data.draw(st.integers(0, 99)))
        .integers(0, 4, call.vision.shape)
        .astype(np.float32)
    )
    feeds = {"score": score, "keep": np.array([share * images])}
    choice = ops.Choice(rank="per_image")
    expected = [
        [
            g * size + e
            for g in range(images)
            for e in ranked(row[g * size : (g + 1) * size], share, share)
        ]
        for row in score
    ]
    assert run("VtrRankPerImage", images=np.array([images]), **feeds)[0].tolist() == expected
    actual = run(
        "VtrSelect",
        choice,
        vision_index=call.vision,
        budget=np.array([images]),
        hidden=call.hidden(),
        **feeds,
    )
    for ours, wanted in zip(actual, selected(call, expected), strict=True):
        assert ours.tolist() == wanted.tolist()


def test_ties_go_to_the_lower_index_among_very_many() -> None:
    score = np.random.default_rng(0).integers(0, 3, (2, 4000)).astype(np.float32)
    for keep in (0, 1, 17, 1999, 3999, 4000):
        feeds = {"score": score, "keep": np.array([keep]), "budget": np.array([keep, keep])}
        assert run("VtrRankJoint", **feeds)[0].tolist() == [
            ranked(row, keep, keep) for row in score
        ]


@given(calls(), HEADS, CHOICES, st.sampled_from(["f4", "f2"]), st.data())
def test_prune_is_score_select_narrow(
    call: Call, heads: Heads, choice: ops.Choice, dtype: str, data: st.DataObject
) -> None:
    query, keys, scale = attention(call, heads, data.draw(st.integers(0, 99)), dtype)
    keep = data.draw(st.integers(0, call.sizes[3]))
    budget = np.minimum(call.counts, keep)
    budget = np.maximum(budget, keep - (call.sizes[3] - call.counts))
    score = scored(call, query, keys, scale, choice)
    assume(all(is_clear(row, int(k)) for row, k in zip(score, budget, strict=True)))
    mask = visible(call.padding, call.current.shape[1])
    hidden, indices, vision = run(
        "VtrTopKPrune",
        choice,
        query=query,
        keys=keys,
        mask=mask,
        vision_index=call.vision,
        keep=np.array([keep]),
        budget=budget,
        hidden=call.hidden(dtype),
        scale=scale,
    )
    expected = selected(
        call, [ranked(row, keep, int(k)) for row, k in zip(score, budget, strict=True)]
    )
    assert indices.tolist() == expected[0].tolist()
    assert vision.tolist() == expected[1].tolist()
    assert hidden.dtype == np.dtype(dtype)
    assert (hidden[:, :, 0] == indices).all()


def is_clear(score: Array, keep: int) -> bool:
    """Whether fp32 must choose as double precision does."""
    order = np.sort(score)[::-1]
    return keep in (0, len(order)) or bool(order[keep - 1] - order[keep] > 1e-5)


@pytest.mark.parametrize("rank", ["joint", "per_image"])
def test_without_vision_tokens_nothing_is_dropped(rank: Any) -> None:
    call = Call(np.ones((2, 3), np.int64), np.ones((2, 4), np.int64), np.zeros((2, 0), np.int64))
    query, keys, scale = attention(call, Heads(2, 2, 4), 0, "f4")
    budget = np.zeros(2 if rank == "joint" else 1, np.int64)
    feeds = {
        "keep": np.array([0]),
        "budget": budget,
        "hidden": call.hidden(),
        "vision_index": call.vision,
    }
    for choice in (ops.Choice("last", "mean", rank), ops.Choice("text", "max", rank)):
        hidden, indices, vision = run(
            "VtrTopKPrune",
            choice,
            query=query,
            keys=keys,
            mask=visible(call.padding, 4),
            scale=scale,
            **feeds,
        )
        assert indices.tolist() == [[0, 1, 2, 3]] * 2
        assert vision.shape == (2, 0)
        assert (hidden == call.hidden()).all()


def test_no_body_hands_an_attribute_on() -> None:
    """TensorRT reads what passes through two functions as 0."""
    for name in ("VtrTopKPrune", "VtrScoredPrune", "VtrThresholdPrune", "VtrRaterRecyclePrune"):
        model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 24}), ir_version=11)
        ops.declare(model, name)
        assert not ops.handed_on(model)
        call = next(iter(model.functions.values()))
        told = ir.Attr("scale", ir.AttributeType.FLOAT, None, ref_attr_name="scale")
        call.append(ir.Node(ops.DOMAIN, "VtrScore", [], [told]))
        assert ops.handed_on(model) == [call.name]
