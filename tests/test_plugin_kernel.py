"""The kernels behind the cut, run on a CPU from their own source, against the definition in numpy."""

import ctypes
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from cut_oracle import Array, Call, ranked, scored, selected, visible
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_on_host import (
    DTYPES,
    HostLauncher,
    Inputs,
    call,
    compile_for_host,
    compile_source,
    rounded,
    stored,
)

from vtr_export import ops
from vtr_export.backends.tensorrt import kernel
from vtr_export.backends.tensorrt.library import device_sm
from vtr_export.errors import EngineError, UnavailableError
from vtr_export.ops.prune import INPUTS, OUTPUTS

compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None,
    reason="no C++ compiler here: apt-get install g++",
)
nvrtc = pytest.mark.skipif(
    not importlib.util.find_spec("cuda") or not importlib.util.find_spec("cuda.bindings"),
    reason="cuda-bindings is not installed",
)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> HostLauncher:
    return HostLauncher(compile_for_host(tmp_path_factory.mktemp("kernels")), multiprocessors=9)


# --- the definition ---


def asking(inputs: Inputs, b: int) -> list[int]:
    """The rows that ask, counted from the end: -1 is the last."""
    length, tokens = inputs.hidden.shape[1], inputs.vision.shape[1]
    if inputs.asks == "last" or length == tokens:
        return [-1]
    seen = inputs.mask[b, 0, -1, -length:]
    first = max((c + 1 for c in inputs.vision[b].tolist() if seen[c]), default=0)
    return [i for i in range(tokens - length, -1) if seen[i] and i + length >= first] + [-1]


def row_score(inputs: Inputs, row: int) -> Array:
    """[B,T] in double precision: what one row's probabilities are, reduced over heads."""
    group = inputs.query.shape[1] // inputs.keys.shape[1]
    keys = np.repeat(inputs.keys.astype(float), group, 1)
    with np.errstate(invalid="ignore", over="ignore"):
        logits = (keys * inputs.query[:, :, row, None].astype(float)).sum(-1) * inputs.scale
        masked = np.where(inputs.mask[:, :, row], logits, -np.inf)
        odds = np.exp(masked - masked.max(-1, keepdims=True))
        probability = odds / odds.sum(-1, keepdims=True)
    return probability.mean(1) if inputs.heads == "mean" else probability.max(1)


def scores(inputs: Inputs) -> Array:
    """[B,V] in double precision: the mean over the rows that ask."""
    rows = [asking(inputs, b) for b in range(len(inputs.query))]
    made = {row: row_score(inputs, row) for row in {row for asked in rows for row in asked}}
    score = np.stack([np.mean([made[i][b] for i in asked], 0) for b, asked in enumerate(rows)])
    seen = inputs.mask[:, 0, -1]
    at = inputs.vision + inputs.keys.shape[2] - inputs.hidden.shape[1]
    raw, real = (np.take_along_axis(values, at, 1) for values in (score, seen))
    return np.where(real, np.where(np.isnan(raw), -1, raw), -2)


def chosen(inputs: Inputs, score: Array) -> list[list[int]]:
    """Entries of each row that survive."""
    if inputs.rank == "joint":
        return [ranked(s, inputs.keep, int(k)) for s, k in zip(score, inputs.budget, strict=True)]
    images = max(1, int(inputs.budget[0]))
    size, share = score.shape[1] // images, inputs.keep // images
    return [
        [g * size + e for g in range(images) for e in ranked(s[g * size :][:size], share, share)]
        for s in score
    ]


def is_clear(inputs: Inputs, score: Array) -> bool:
    """Whether fp32 must choose as double precision does: at each boundary a tie, or a gap."""
    images = max(1, int(inputs.budget[0])) if inputs.rank == "per_image" else 1
    for b, row in enumerate(score):
        for part in np.split(row, images):
            share = int(inputs.budget[b]) if inputs.rank == "joint" else inputs.keep // images
            if not 0 < share < len(part):
                continue
            inside, outside = np.sort(part)[::-1][share - 1 :][:2]
            if 0 < inside - outside < 1e-4 * abs(inside):
                return False
    return True


def check(launcher: kernel.Launcher, inputs: Inputs, shift: int = 0) -> None:
    """Scores to fp32, everything else to the bit, in either order of threads and blocks."""
    expected = scores(inputs)
    call_ = Call(np.zeros((1, 0)), np.zeros(inputs.hidden.shape[:2]), inputs.vision)
    indices, vision = selected(call_, chosen(inputs, expected))
    hidden = np.take_along_axis(stored(inputs.hidden, inputs.dtype), indices[:, :, None], 1)
    for is_reversed in (False, True):
        if isinstance(launcher, HostLauncher):
            launcher.is_reversed = is_reversed
        actual = call(launcher, inputs, shift)
        if actual.score is not None:
            np.testing.assert_allclose(actual.score, expected, atol=2e-6)
        assert actual.indices.tolist() == indices.tolist()
        assert actual.vision.tolist() == vision.tolist()
        assert actual.hidden.tobytes() == hidden.tobytes()
        assert len(actual.launches) <= (2 if inputs.asks == "last" else 3)


@dataclass(frozen=True)
class Sizes:
    """Of a random call; ``distinct``: keys to draw from, so that some are equal.

    ``behind``: columns at the end, of ``text``, that are no vision token.
    """

    batch: int = 2
    kv_heads: int = 1
    group: int = 2
    head_dim: int = 16
    past: int = 3
    text: int = 4
    behind: int = 1
    images: int = 1
    image: int = 20
    width: int = 8
    distinct: int = 1000
    mask_rows: int = 1

    @property
    def vision(self) -> int:
        return self.images * self.image


def draw(sizes: Sizes, seed: int, *, padded: bool = True, **options: Any) -> Inputs:
    """Left-padded rows of real tokens, text behind vision tokens; a row may have fewer of these.

    Where text asks, some of it is not real, and each row sees what it will.
    """
    rng = np.random.default_rng(seed)
    dtype, asks = options.get("dtype", "fp32"), options.get("asks", "last")
    length, total = sizes.text + sizes.vision, sizes.past + sizes.text + sizes.vision
    seen = rng.random((sizes.batch, total)) < 0.9
    seen[:, sizes.past :] = True
    vision = np.zeros((sizes.batch, sizes.vision), np.int64)
    for b in range(sizes.batch):
        pads = int(rng.integers(0, length)) if padded and b else 0
        room = max(0, length - min(sizes.behind, sizes.text) - pads)
        real = min(sizes.vision, room)
        places = pads + np.sort(rng.permutation(room)[:real])
        vision[b] = np.concatenate([np.arange(sizes.vision - real), places])
        seen[b, sizes.past : sizes.past + pads] = False
        if asks == "text":
            text = np.setdiff1d(np.arange(length - 1), vision[b])
            seen[b, sizes.past + text[rng.random(len(text)) < 0.1]] = False
    rows = sizes.text + 2 if asks == "text" else 3
    mask_rows = rows if asks == "text" else sizes.mask_rows
    mask = rng.random((sizes.batch, 1, mask_rows, total)) < 0.5
    mask[:, 0, -1] = seen
    heads = sizes.kv_heads * sizes.group
    keys = rng.normal(size=(sizes.batch, sizes.kv_heads, sizes.distinct, sizes.head_dim))
    which = rng.integers(0, sizes.distinct, total)
    return Inputs(
        query=rounded(2 * rng.normal(size=(sizes.batch, heads, rows, sizes.head_dim)), dtype),
        keys=rounded(keys[:, :, which], dtype),
        mask=mask,
        vision=vision,
        budget=np.full(sizes.batch, options["keep"]),
        hidden=rounded(rng.normal(size=(sizes.batch, length, sizes.width)), dtype),
        **options,
    )


def real_tokens(inputs: Inputs) -> Array:
    past = inputs.keys.shape[2] - inputs.hidden.shape[1]
    return np.take_along_axis(inputs.mask[:, 0, -1], inputs.vision + past, 1).sum(1)


SIZES = st.builds(
    Sizes,
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 5, 9]),
    head_dim=st.sampled_from([1, 8, 20, 64, 72, 136]),
    past=st.integers(0, 40),
    text=st.integers(1, 30),
    behind=st.integers(1, 30),
    image=st.integers(0, 150),
    width=st.sampled_from([1, 8, 24]),
    distinct=st.sampled_from([1, 3, 30, 1000]),
    mask_rows=st.sampled_from([1, 4]),
)
OPTIONS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "heads": st.sampled_from(["mean", "max"]),
        "asks": st.sampled_from(["last", "text"]),
    }
)


@compiler
@settings(max_examples=90)
@given(SIZES, OPTIONS, st.integers(0, 2**32), st.sampled_from([0, 8]), st.data())
def test_kernel_is_the_definition(
    launcher: HostLauncher, sizes: Sizes, options: Any, seed: int, shift: int, data: Any
) -> None:
    keep = data.draw(st.integers(0, sizes.vision))
    inputs = draw(sizes, seed, keep=keep, **options)
    budget = [
        data.draw(st.integers(max(0, keep - sizes.vision + real), min(keep, real)))
        for real in real_tokens(inputs).tolist()
    ]
    inputs = replace(inputs, budget=np.array(budget))
    assume(is_clear(inputs, scores(inputs)))
    check(launcher, inputs, shift)


@compiler
@settings(max_examples=20)
@given(SIZES, OPTIONS, st.integers(1, 5), st.integers(0, 2**32), st.data())
def test_each_image_keeps_its_own_best(
    launcher: HostLauncher, sizes: Sizes, options: Any, images: int, seed: int, data: Any
) -> None:
    sizes = replace(sizes, images=images, image=sizes.image // images)
    share = data.draw(st.integers(0, sizes.image))
    inputs = draw(sizes, seed, padded=False, keep=share * images, rank="per_image", **options)
    said = data.draw(st.sampled_from([0, 1])) if images == 1 else images
    inputs = replace(inputs, budget=np.array([said]))
    assume(is_clear(inputs, scores(inputs)))
    check(launcher, inputs)


@compiler
@pytest.mark.parametrize("asks", ["last", "text"])
@pytest.mark.parametrize(("kv_heads", "group"), [(3, 1), (2, 2), (1, 3), (2, 4), (1, 7), (2, 9)])
def test_every_grouping_of_heads(
    launcher: HostLauncher, asks: Any, kv_heads: int, group: int
) -> None:
    """Up to eight heads are multiplied in one pass, of as many rows as fit."""
    for head_dim, dtype, heads in (
        (20, "fp32", "mean"),
        (64, "fp16", "max"),
        (136, "bf16", "mean"),
    ):
        sizes = Sizes(1, kv_heads, group, head_dim, text=11, behind=7, image=140)
        options: Any = {"dtype": dtype, "heads": heads, "asks": asks}
        inputs = draw(sizes, group, padded=False, keep=50, **options)
        assert is_clear(inputs, scores(inputs))
        check(launcher, inputs)


@compiler
@pytest.mark.parametrize("keep", [1, 15, 50, 99])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lower_index(launcher: HostLauncher, dtype: Any, keep: int) -> None:
    """Two keys alternate: half of the scores are one number, half another."""
    inputs = draw(Sizes(image=100, distinct=2, group=3), 0, padded=False, keep=keep, dtype=dtype)
    assert len(np.unique(scores(inputs)[0])) == 2
    check(launcher, inputs)


@compiler
def test_more_than_tensorrt_would_rank(launcher: HostLauncher) -> None:
    """Its TopK ends at 3,840; here the boundary lies within a tie of thousands as well.

    One block gathers more rows than it has threads.
    """
    launcher = HostLauncher(launcher.library, multiprocessors=1)
    for distinct, keep in ((10**6, 4000), (2, 4100)):
        sizes = Sizes(1, 1, 1, 8, image=5001, distinct=distinct, past=0)
        inputs = draw(sizes, 3, padded=False, keep=keep)
        check(launcher, replace(inputs, keys=inputs.keys * 4, scale=1.0))


@compiler
@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_ranks_below_numbers_and_above_pads(
    launcher: HostLauncher, poison: float, heads: Any
) -> None:
    """Wherever it stands: in a query, in a key that is seen, in one that is not."""
    whole = draw(Sizes(batch=3, group=2, image=30, past=40), 5, keep=7, heads=heads)
    whole.query[:, :, -1, 5] = 1.0
    places = {
        "query": (whole.query, np.s_[1, 0, -1, 3]),
        "another row": (whole.query, np.s_[1, 0, 0, 3]),
        "key": (whole.keys, np.s_[0, 0, 70, :]),
        "chunk": (whole.keys, np.s_[0, 0, :64, :]),
        "infinite logits": (whole.keys, np.s_[0, 0, :64, 5]),
        "all": (whole.keys, np.s_[0, 0, :, :]),
        "pads": (whole.keys, np.s_[2, 0, ~whole.mask[2, 0, -1], :]),
    }
    for name, (values, at) in places.items():
        poisoned = values.copy()
        poisoned[at] = poison
        inputs = replace(whole, **{"query" if values is whole.query else "keys": poisoned})
        expected = scores(inputs)
        if name in ("another row", "pads"):
            assert (expected == scores(whole)).all()
        elif name == "infinite logits" and np.isneginf(poison):
            assert (expected[0] == 0).any()
            assert (expected[0] > 0).any()
        elif name == "all" or not np.isneginf(poison):
            assert ((expected == -1) | (expected == -2)).any(1)[1 if name == "query" else 0]
        check(launcher, inputs)


@compiler
@pytest.mark.parametrize("asks", ["last", "text"])
@pytest.mark.parametrize("rank", ["joint", "per_image"])
def test_what_needs_no_ranking_is_one_launch(launcher: HostLauncher, rank: Any, asks: Any) -> None:
    for image, keep in ((0, 0), (40, 0), (40, 40)):
        sizes = Sizes(image=image, past=2)
        inputs = draw(sizes, 1, padded=False, keep=keep, rank=rank, asks=asks)
        inputs = replace(inputs, budget=np.full(2 if rank == "joint" else 1, image and keep and 1))
        if rank == "joint":
            inputs = replace(inputs, budget=np.full(2, keep))
        check(launcher, inputs)
        assert [name for name, _ in launcher.launches] == ["vtr_prune"]


@compiler
@pytest.mark.parametrize("asks", ["last", "text"])
@pytest.mark.parametrize(("rank", "budget"), [("joint", [-9, 10**12]), ("per_image", [10**12])])
def test_nonsense_touches_nothing_outside(
    launcher: HostLauncher, rank: Any, budget: list[int], asks: Any
) -> None:
    """Columns that do not exist, budgets and images that cannot be: pages around all data end the process."""
    inputs = draw(Sizes(image=40), 1, padded=False, keep=9, rank=rank, asks=asks)
    if asks == "text":  # fewer rows than must ask
        inputs = replace(inputs, query=inputs.query[:, :, :2], mask=inputs.mask[:, :, -1:])
    inputs.vision[:, [0, 7, 39]] = -1, 44, 10**12
    actual = call(launcher, replace(inputs, budget=np.array(budget)))
    assert (actual.indices >= 0).all()
    assert (actual.indices < 44).all()
    rows = np.take_along_axis(inputs.hidden, actual.indices[:, :, None], 1)
    assert actual.hidden.tobytes() == rows.tobytes()


@compiler
@pytest.mark.parametrize("asks", ["last", "text"])
def test_a_generated_token_passes(launcher: HostLauncher, asks: Any) -> None:
    inputs = draw(Sizes(batch=3, text=1, image=0, past=9), 1, padded=False, keep=0, asks=asks)
    actual = call(launcher, inputs)
    assert actual.indices.tolist() == [[0]] * 3
    assert (actual.hidden == inputs.hidden).all()


# --- rows of text ask ---


def prompt(
    layouts: list[str], seed: int, *, past: int = 0, distinct: int = 99, **options: Any
) -> Inputs:
    """Rows of ``_`` pads, ``t`` text and ``v`` vision tokens of one length, behind a real past."""
    rng, length = np.random.default_rng(seed), len(layouts[0])
    current = np.array([[letter != "_" for letter in row] for row in layouts]).astype(int)
    found = [[c for c, letter in enumerate(row) if letter == "v"] for row in layouts]
    most = max(map(len, found))
    vision = np.array([[*range(most - len(columns)), *columns] for columns in found])
    call = Call(np.ones((len(layouts), past), int), current, vision)
    keys = rng.normal(size=(len(layouts), 2, distinct, 16))[
        :, :, rng.integers(0, distinct, past + length)
    ]
    inputs = Inputs(
        query=rounded(
            2 * rng.normal(size=(len(layouts), 6, length, 16)), options.get("dtype", "fp32")
        ),
        keys=rounded(keys, options.get("dtype", "fp32")),
        mask=visible(call.padding, length),
        vision=vision,
        budget=np.minimum(call.counts, options["keep"]),
        hidden=rounded(rng.normal(size=(len(layouts), length, 8)), options.get("dtype", "fp32")),
        asks="text",
        **options,
    )
    choice: Any = ops.Choice("text", inputs.heads, inputs.rank)  # type: ignore[arg-type]
    expected = scored(call, inputs.query, inputs.keys, inputs.scale, choice)
    np.testing.assert_allclose(scores(inputs), expected, rtol=1e-9)
    return inputs


PROMPTS = {
    "a question": (["tttvvvvvvvvtttt"], [4]),
    "text between images": (["tvvvvtttvvvvtt"], [2]),
    "a question before its image": (["tttttvvvvvvvv"], [1]),
    "nothing but an image": (["vvvvvvvv"], [1]),
    "a padded batch": (["tvvvvvvvvttttt", "____tvvvvvvttt", "_________ttttt"], [5, 3, 5]),
    "more rows than one tile has": (["t" + "v" * 140 + "t" * 21], [21]),
    "long": (["tt" + "v" * 600 + "ttt"], [3]),
}


@compiler
@pytest.mark.parametrize(("layouts", "asked"), PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_text_behind_the_images_asks(
    launcher: HostLauncher, layouts: list[str], asked: list[int], heads: Any
) -> None:
    for past, dtype in ((0, "fp16"), (37, "bf16"), (5, "fp32")):
        inputs = prompt(layouts, 1, past=past, keep=3, heads=heads, dtype=dtype)
        assert [len(asking(inputs, b)) for b in range(len(layouts))] == asked
        assert is_clear(inputs, scores(inputs))
        check(launcher, inputs)
        assert [name for name, _ in launcher.launches] == [
            f"vtr_text_softmax_{dtype}",
            f"vtr_text_score_{dtype}",
            "vtr_prune",
        ]


@compiler
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_rows_that_do_not_ask_are_not_looked_at(launcher: HostLauncher, poison: float) -> None:
    """Text before the image, vision tokens and pads ask nothing; one row that asks spoils all."""
    inputs = prompt(["tttvvvvvvvvttt", "_____tvvvvvttt"], 2, keep=3)
    whole = scores(inputs)
    query = inputs.query.copy()
    query[:, :, :-3] = poison
    silent = replace(inputs, query=query)
    assert (scores(silent) == whole).all()
    check(launcher, silent)
    query[0, 4, -3] = np.nan
    spoilt = replace(inputs, query=query)
    assert (scores(spoilt)[0] == -1).all()
    assert (scores(spoilt)[1] == whole[1]).all()
    check(launcher, spoilt)


@compiler
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_ties_of_text_rows_go_to_the_lower_index(launcher: HostLauncher, heads: Any) -> None:
    """Two keys alternate over two blocks of tokens, asked by rows of several blocks."""
    inputs = prompt(["v" * 200 + "t" * 9], 3, distinct=2, keep=50, heads=heads, dtype="fp16")
    assert len(np.unique(scores(inputs)[0].round(12))) == 2
    check(launcher, inputs)


@compiler
def test_a_row_that_sees_nothing_makes_nothing_a_number(launcher: HostLauncher) -> None:
    """No mask of a decoder has one; the body makes it NaN."""
    inputs = prompt(["tvvvvvvtt", "tvvvvvvtt"], 4, keep=2)
    inputs.mask[0, 0, -2] = False
    assert (scores(inputs)[0] == -1).all()
    assert (scores(inputs)[1] > 0).all()
    check(launcher, inputs)


@compiler
def test_one_row_of_mask_holds_for_all_that_ask(launcher: HostLauncher) -> None:
    """As it broadcasts in the body."""
    inputs = prompt(["tvvvvvvttt", "___tvvvvtt"], 6, past=3, keep=2)
    inputs.mask[:, :, :, 1] = False
    last = inputs.mask[:, :, -1:]
    expected = scores(replace(inputs, mask=np.repeat(last, inputs.mask.shape[2], 2)))
    np.testing.assert_allclose(
        call(launcher, replace(inputs, mask=last)).score, expected, atol=2e-6
    )


@compiler
@pytest.mark.parametrize("hidden", [0, 300])
def test_a_block_takes_many_chunks_of_keys(launcher: HostLauncher, hidden: int) -> None:
    """Where rows are many, one block reads all keys of a tile, in chunks that may be all hidden."""
    sizes = Sizes(1, 2, 4, past=0, text=1100, behind=3, image=40)
    inputs = draw(sizes, 5, keep=9, asks="text")
    inputs.mask[:, :, :, :hidden] = False
    assert len(asking(inputs, 0)) > 2
    assert is_clear(inputs, scores(inputs))
    check(launcher, inputs)
    assert launcher.launches[0] == ("vtr_text_softmax_fp32", (1100 // 2, 2, 1))


# --- the artifact's truth ---


def model(inputs: Inputs) -> onnxruntime.InferenceSession:
    """One node with its function, in ONNX Runtime."""
    types = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
    data, int64 = types[inputs.dtype], ir.DataType.INT64
    signature = ((data, 4), (data, 4), (ir.DataType.BOOL, 4), (int64, 2), (int64, 1), (int64, 1))
    values = [
        ir.val(name, shape=[f"{name}_{axis}" for axis in range(rank)], type=ir.TensorType(dtype))
        for name, (dtype, rank) in zip(INPUTS, (*signature, (data, 3)), strict=True)
    ]
    is_joint = inputs.rank == "joint"
    choice: Any = ops.Choice(inputs.asks, inputs.heads, inputs.rank, is_joint)  # type: ignore[arg-type]
    node = ir.Node(
        ops.DOMAIN, ops.PRUNE, values, ops.prune_attributes(inputs.scale, choice), num_outputs=3
    )
    for value, (name, dtype, rank) in zip(
        node.outputs,
        zip(OUTPUTS, (data, int64, int64), (3, 2, 2), strict=True),
        strict=True,
    ):
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape([None] * rank)
    graph = ir.Graph(
        values, node.outputs, nodes=[node], opset_imports={"": 24, ops.DOMAIN: 1}, name="cut"
    )
    whole = ir.Model(graph, ir_version=11)
    ops.declare(whole, ops.PRUNE, choice)
    return onnxruntime.InferenceSession(ir.to_proto(whole).SerializeToString())


@compiler
@pytest.mark.parametrize(("asks", "dtype"), [("last", "fp32"), ("last", "fp16"), ("text", "fp16")])
@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("rank", ["joint", "per_image"])
def test_kernel_is_what_onnx_runtime_makes_of_the_functions_body(
    launcher: HostLauncher, dtype: Any, heads: Any, rank: Any, asks: Any
) -> None:
    """Even where a row is short of pads to fill what its budget leaves."""
    sizes = Sizes(3, 2, 3, 64, past=37, text=9, behind=4, image=90, distinct=40, mask_rows=99)
    options: Any = {"dtype": dtype, "heads": heads, "rank": rank, "asks": asks}
    drawn = draw(sizes, 13, padded=rank == "joint", keep=30, **options)
    budgets = [[3]] if rank == "per_image" else [[30, 30, 30], [10, 25, 0]]
    poisoned = [drawn.keys.copy() for _ in range(3)]
    poisoned[1][0, 0, 100, 0], poisoned[2][0, 1, 100, :] = np.nan, np.inf
    session = None
    for budget in budgets:
        for keys in poisoned:
            inputs = replace(drawn, budget=np.array(budget), keys=keys)
            assert is_clear(inputs, scores(inputs))
            session = session or model(inputs)
            wide = np.repeat(inputs.query, 1 if asks == "text" else 40, 2)[:, :, -99:]
            feeds = {
                "query": stored(wide, dtype),
                "keys": stored(keys, dtype),
                "mask": inputs.mask,
                "vision_index": inputs.vision,
                "keep": np.array([30]),
                "budget": inputs.budget,
                "hidden": stored(inputs.hidden, dtype),
            }
            hidden, indices, vision = session.run(None, feeds)
            if budget == [10, 25, 0]:
                assert indices[0, 0] == 98  # fewer survive than there is room for
            for launcher.is_reversed in (False, True):
                actual = call(launcher, inputs)
                assert actual.indices.tolist() == indices.tolist()
                assert actual.vision.tolist() == vision.tolist()
                assert actual.hidden.tobytes() == hidden.tobytes()


# --- what is computed on the host ---

SHAPES = st.builds(
    kernel.Shape,
    batch=st.integers(1, 200),
    heads=st.sampled_from([8, 16, 24, 32, 40, 64]),
    kv_heads=st.sampled_from([1, 8]),
    head_dim=st.sampled_from([20, 64, 128]),
    query_rows=st.just(1),
    mask_rows=st.just(1),
    total=st.integers(9000, 200000),
    new=st.integers(8500, 9000),
    vision=st.integers(0, 8500),
    keep=st.just(0),
    hidden=st.sampled_from([7, 4096]),
    query=st.sampled_from(["last", "text"]),
).flatmap(lambda shape: st.integers(0, shape.vision).map(lambda k: replace(shape, keep=k)))


@compiler
@given(SHAPES, st.sampled_from(DTYPES), st.integers(1, 200))
def test_python_and_cpp_divide_the_work_alike(
    launcher: HostLauncher, shape: kernel.Shape, dtype: Any, multiprocessors: int
) -> None:
    pointers = kernel.Pointers(*range(1000, 1009))
    given_ = kernel.fill(shape, dtype, 0.5, "max", "joint", pointers, 256, multiprocessors)
    params = kernel.Params.from_buffer_copy(given_)
    params.chunk = params.tiles = params.wide = -1
    library = launcher.library
    library.host_divide(ctypes.byref(params), kernel.DTYPES[dtype], multiprocessors)
    assert bytes(params) == bytes(given_)
    assert library.host_workspace_bytes(ctypes.byref(params)) == kernel.workspace_bytes(shape)
    assert library.host_shared_bytes(ctypes.byref(params)) == shape.shared_bytes
    grown = replace(shape, total=shape.total + 999, batch=shape.batch + 1)
    assert kernel.workspace_bytes(grown) > kernel.workspace_bytes(shape)


@compiler
@pytest.mark.parametrize("asks", ["last", "text"])
def test_the_librarys_way_to_launch_is_pythons(launcher: HostLauncher, asks: Any) -> None:
    """``vtr_launch`` of the C++ shell makes the same calls as ``Launcher``."""
    sizes = Sizes(image=300, width=64, text=24, behind=20)
    inputs = draw(sizes, 2, padded=False, keep=17, dtype="fp16", asks=asks)

    class Library(HostLauncher):
        def _start(self, name: str, *rest: Any) -> None:
            params = rest[-1]
            if name == "vtr_prune":  # the last of a call: make the whole of it
                self.library.host_call(ctypes.byref(params), 1, 2, self.multiprocessors)

    other = call(Library(launcher.library, launcher.multiprocessors), inputs)
    mine = call(launcher, inputs)
    assert other.indices.tolist() == mine.indices.tolist()
    assert other.hidden.tobytes() == mine.hidden.tobytes()


@compiler
def test_calls_beyond_the_kernels_limits_are_refused(launcher: HostLauncher) -> None:
    wide = draw(Sizes(head_dim=520), 0, keep=2)
    with pytest.raises(EngineError, match="512"):
        call(launcher, wide)
    shape = replace(wide.shape, head_dim=8, new=400_000, total=400_000)
    with pytest.raises(EngineError, match="400000 tokens"):
        launcher.launch(shape, "fp32", 1.0, "mean", "joint", kernel.Pointers(*range(9)), 0, 0)


@nvrtc
def test_compiles_without_a_gpu() -> None:
    text = kernel.compile_ptx(75).decode()
    assert ".target sm_75" in text
    names = {f"vtr_{part}_{dtype}" for dtype in DTYPES for part in kernel.PARTS} | {"vtr_prune"}
    assert {name for name in names if f".entry {name}(" in text} == names


@compiler
@nvrtc
def test_cuda_python_launches_what_nvrtc_compiled(tmp_path: Path) -> None:
    """The whole way of a call, but for the GPU: a driver of ours runs the kernels on the CPU."""
    compile_source("cuda_driver.cpp", tmp_path / "libcuda.so.1")
    (tmp_path / "image").write_bytes(kernel.compile_image(86))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("cuda_child.py"), tmp_path / "image"],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["no", "image", "fp32", "fp16", "bf16", "long"]


@nvrtc
def test_a_missing_driver_is_named() -> None:
    if device_sm() is not None:  # asked here: cuda_child.py imports this file beside its own driver
        pytest.skip("a GPU is here: only a machine without one refuses")
    with pytest.raises(UnavailableError, match="no CUDA driver"):
        kernel.launcher()


# --- the benchmark's parts ---


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = Path(__file__).parents[1] / "samples" / "bench"
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("gpu_kernel")
    for name in ("gpu_kernel", "measure"):
        sys.modules.pop(name, None)


@compiler
@pytest.mark.parametrize("query", ["last", "text"])
def test_the_benchmark_finds_faults_and_only_faults(
    bench: Any, launcher: HostLauncher, query: Any
) -> None:
    """The kernel and the unfused sequence pass, both on the CPU; every damage is named."""
    torch.manual_seed(0)
    shape = bench.shape_of(96, text=9, query=query)
    drawn = bench.draw(torch, shape, torch.float16, "cpu")
    arrays = {name: tensor.numpy() for name, tensor in drawn.items()}
    vision = arrays["vision_index"]
    rows, keys = (arrays[name].astype(float) for name in ("query", "keys"))
    score = bench.scores(rows, keys, vision, 105)
    made = Inputs(
        **{k: arrays[k] for k in ("query", "keys", "mask", "budget", "hidden")},
        vision=vision,
        keep=shape.keep,
        dtype="fp16",
        scale=bench.SCALE,
        asks=query,
    )
    assert made.shape == shape
    np.testing.assert_allclose(scores(made), score)
    actual = call(launcher, made)
    outputs = actual.hidden, actual.indices, actual.vision
    plain = [tensor.numpy() for tensor in bench.unfused(torch, drawn, shape.keep)]
    for each in (outputs, plain):
        assert bench.faults(score, vision, arrays["hidden"], each) == []
    rows, indices, places = outputs
    worst = vision[0, score[0].argmin()]
    swapped = np.sort(np.append(indices[0, np.arange(len(indices[0])) != places[0, 0]], worst))
    damages = {
        "order": (rows[:, ::-1], indices[:, ::-1], places),
        "text": (rows[:, 1:], indices[:, 1:], places - 1),
        "miscounted": (rows, indices, places + 4),
        "lost to": (arrays["hidden"][:, swapped], swapped[None], places),
        "other rows": (rows[:, ::-1], indices, places),
    }
    for words, damaged in damages.items():
        assert words in "".join(bench.faults(score, vision, arrays["hidden"], damaged))


def test_the_floor_is_what_must_move(bench: Any) -> None:
    """8 heads of 128 in fp16 are 2 KiB a key; a row of 4096 is 8 KiB, read and written."""
    shape = bench.shape_of(640)
    keys, rows = (640 + 64) * 2048, 2 * (320 + 64) * 8192
    small = 32 * 128 * 2 + 704 + 8 * 640 + 8 * (384 + 320)
    assert bench.floor_bytes(shape, "fp16") == keys + rows + small
    assert bench.floor_bytes(shape, "fp32") == 2 * (keys + rows) + small + 32 * 128 * 2


def test_the_benchmarks_table_says_what_was_met(bench: Any) -> None:
    text = bench.report(
        [bench.Times(640, 3.0, 2.0, 14.0), bench.Times(2880, 5.0, 2.0, 25.0)],
        [bench.Times(640, 30.0, 2.0, 60.0)],
        2e12,
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:]]
    assert rows[-1] == ["640", "320", "30.0 us", "60.0 us", "2.0"]
    assert text.startswith("A copy moves 2000 GB/s.")
    assert rows[0] == ["640", "320", "3.0 us", "2.0 us", "1.50", "met", "14.0 us", "4.7", "MISSED"]
    assert rows[1][4:] == ["2.50", "MISSED", "25.0 us", "5.0", "met"]


def test_without_a_gpu_the_benchmark_says_so(bench: Any) -> None:
    if (why := bench.missing()) is None:
        pytest.skip("a GPU is here: samples/bench/gpu_kernel.py would run on it")
    done = subprocess.run([sys.executable, bench.__file__], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"gpu_kernel.py needs a GPU: {why}"]
