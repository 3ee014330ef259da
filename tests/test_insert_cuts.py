"""Golden rewrites of InsertCuts; what they compute is compared with a definition in numpy."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Golden
from cut_oracle import Call, calls
from decoder_oracle import Oracle, drawn
from filtering_decoder import Filtering
from graph_texts import Array, Session, load, read
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass
from recycling_decoder import Recycling, says_so

from vtr_export import ops
from vtr_export.errors import AnalysisError
from vtr_export.passes.insert_cuts import InsertCuts
from vtr_export.schedule import Cut, Keep, Resolved, Schedule

GRAPHS = Path(__file__).parents[1] / "graphs" / "insert_cuts"
CASES = sorted(folder.name for folder in GRAPHS.iterdir())
TOKENS = {"shares": None, "ragged": None, "per_image": 2}  # an image
USUAL_TOKENS = 4
TUNABLE = {"tunable"}
PROTECTED = {"thresholds"}  # by a vision encoder, which these decoders have none of
SOFTCAP = {"softcap": 1.5}
GATE = 1e-4  # of values up to about 10, in fp32
CLEAR = 1e-5  # a margin that fp32 does not turn round


@dataclass(frozen=True)
class Model:
    """What a schedule asks of a model."""

    layers: int
    tokens_per_image: int | None
    mrope: bool = False


def resolved(case: str) -> Resolved:
    """The case's schedule, for the decoder of its graph."""
    text = (GRAPHS / case / "before.onnxtxt").read_text(encoding="utf-8")
    layers = text.count("= Attention")
    model = Model(layers, TOKENS.get(case, USUAL_TOKENS))
    schedule = Schedule.load(GRAPHS / case / "schedule.yaml").resolve(model)
    return replace(schedule, protect=True) if case in PROTECTED else schedule


def before(case: str) -> ir.Model:
    return load(GRAPHS / case / "before.onnxtxt")


def choice(case: str) -> ops.Choice:
    schedule = resolved(case)
    is_ragged = schedule.tokens_per_image is None and len(schedule.cuts) > 1
    is_ragged = is_ragged or schedule.threshold is not None
    said = schedule.query, schedule.heads, schedule.rank
    return ops.Choice(*said, is_ragged, SOFTCAP.get(case), schedule.rule)


def cut(model: ir.Model, schedule: Resolved, *, tunable: bool = False) -> ir.Model:
    """As the compiler applies it."""
    for step in (
        InsertCuts(schedule, tunable=tunable),
        RemoveUnusedNodesPass(),
        TopologicalSortPass(),
    ):
        step(model)
    return model


@cache
def session(case: str, file: str) -> Session:
    """The text in a file, run as it is written."""
    return Session(load(GRAPHS / case / file, choice(case)))


@pytest.mark.parametrize("case", CASES)
def test_a_decoder_becomes_its_golden(case: str, golden: Golden) -> None:
    folder = GRAPHS / case
    model = cut(before(case), resolved(case), tunable=case in TUNABLE)
    golden(model, folder / "after.onnxtxt")
    assert {path.name for path in folder.iterdir()} == {
        "before.onnxtxt",
        "schedule.yaml",
        "after.onnxtxt",
    }


def some_calls(schedule: Resolved) -> st.SearchStrategy[Call]:
    """Rows of their own text and vision tokens; whole images where each has a budget."""
    size = schedule.tokens_per_image if schedule.rank == "per_image" else None
    return calls() if size is None else calls(st.integers(0, 3).map(lambda n: n * size), size)


def keeps(schedule: Resolved) -> Array:
    """The input of a tunable graph that says what ``schedule`` says."""
    return np.array([item.keep.numerator for item in schedule.cuts])


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=60)
@given(st.data(), st.integers(0, 2**32))
def test_what_is_written_computes_what_a_cut_is(case: str, data: st.DataObject, seed: int) -> None:
    """After a random past of a length of its own for each stage: every output, and no other."""
    schedule = resolved(case)
    call = data.draw(some_calls(schedule))
    for file, known in (
        ("before.onnxtxt", replace(schedule, cuts=())),
        ("after.onnxtxt", schedule),
    ):
        run = session(case, file)
        feeds = drawn(run.inputs, call, seed) | {"keep": keeps(schedule)}
        kind = Recycling if says_so(known) and known.cuts else Oracle
        kind = Filtering if known.threshold is not None and known.cuts else kind
        expected = kind(known, feeds, call, SOFTCAP.get(case)).decode()
        assume(expected.margin > CLEAR)
        actual = run(feeds)
        assert expected.outputs.keys() == actual.keys()
        for name, wanted in expected.outputs.items():
            assert actual[name].shape == wanted.shape, name
            np.testing.assert_allclose(actual[name], wanted, rtol=GATE, atol=GATE, err_msg=name)


@cache
def keeping_all(case: str) -> tuple[Session, Session]:
    """The graph before its cuts, and with cuts that keep every token."""
    schedule = resolved(case)
    every = tuple(Cut(item.before_layer, Keep(1, 1)) for item in schedule.cuts)
    return session(case, "before.onnxtxt"), Session(
        cut(before(case), replace(schedule, cuts=every))
    )


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=10)
@given(st.data(), st.integers(0, 2**32))
def test_cuts_that_keep_everything_change_no_bit(case: str, data: st.DataObject, seed: int) -> None:
    """With the same past in every stage; repacked positions are those of a row without pads."""
    plain, whole = keeping_all(case)
    call = data.draw(some_calls(resolved(case)))
    call = replace(call, past=np.ones_like(call.past))
    feeds = drawn(plain.inputs, call, seed)
    pasts = {name: call.past for name in whole.inputs if name.startswith("past_mask")}
    every = {"protected": np.ones_like(call.vision)} if "protected" in whole.inputs else {}
    expected, actual = plain(feeds), whole(feeds | pasts | every)
    for name, wanted in expected.items():
        assert (actual[name] == wanted).all(), name
    kept = [actual[name] for name in actual if name.startswith("kept")]
    assert all((rows == np.arange(call.current.shape[1])).all() for rows in kept)


def test_a_budget_that_is_an_input_and_one_that_is_written_agree_to_the_bit() -> None:
    tunable = session("tunable", "after.onnxtxt")
    schedule = resolved("tunable")
    call = Call(
        np.ones((2, 0), np.int64), np.ones((2, 9), np.int64), np.array([[1, 2, 4, 5, 6]] * 2)
    )
    for numbers in ((4, 4), (3, 1), (2, 0)):
        written = tuple(
            Cut(item.before_layer, Keep(k, USUAL_TOKENS))
            for item, k in zip(schedule.cuts, numbers, strict=True)
        )
        frozen = Session(cut(before("tunable"), replace(schedule, cuts=written)))
        feeds = drawn(frozen.inputs, call, seed=1)
        expected, actual = frozen(feeds), tunable(feeds | {"keep": np.array(numbers)})
        assert all((actual[name] == wanted).all() for name, wanted in expected.items())
        assert actual["kept.1"].shape[1] == 9 - 5 + 5 * numbers[1] // USUAL_TOKENS


# --- what cannot be cut stays as it was ---

MASK = "mask = vtr.VtrCausalMask (attention_mask, inputs_embeds)"
PADDING = """real = Cast <to: int = 9> (attention_mask)
   rows = Constant <value_ints: ints = [1, 2]> ()
   mask = Unsqueeze (real, rows)"""
COUNTED = """length = Shape <start: int = 1, end: int = 2> (inputs_embeds)
   length_scalar = Squeeze (length)
   zero = Constant <value_int: int = 0> ()
   step = Constant <value_int: int = 1> ()
   numbers = Range (zero, length_scalar, step)
   around = Constant <value_ints: ints = [0, 2]> ()
   position = Unsqueeze (numbers, around)"""
FOLDED = """merged_shape = Constant <value_ints: ints = [0, -1]> ()
   split_shape = Constant <value_ints: ints = [0, -1, 4]> ()
   merged = Reshape (inputs_embeds, merged_shape)
   again = Reshape (merged, split_shape)
   attended_1 = Add (hidden_1, again)"""
FORKED = """other = Reshape (heads_rows_0, flat_shape)
   attended_1 = Add (other, out_1)"""
TABLE = """table_shape = Constant <value_ints: ints = [1, 9, 4]> ()
   table = ConstantOfShape (table_shape)
   hidden_1 = Add (attended_0, table)"""
REFUSED: dict[
    str, tuple[str, str, str, str]
] = {  # case, text, what replaces it, words of the error
    "a mask of its own": ("from_previous", MASK, PADDING, "its mask 'mask'"),
    "positions counted from a length": (
        "from_previous",
        "position = Unsqueeze (position_ids, two)",
        COUNTED,
        "'query_0' leads to an attention",
    ),
    "tokens merged with features": (
        "from_previous",
        "attended_1 = Add (hidden_1, out_1)",
        FOLDED,
        "'again' crosses .*opaque",
    ),
    "keys of an earlier layer": (
        "from_previous",
        '(query_1, "present.1.key"',
        '(query_1, "present.0.key"',
        "earlier length",
    ),
    "new keys before the past": (
        "from_previous",
        '("past_key_values.1.key", key_1)',
        '(key_1, "past_key_values.1.key")',
        "past keys before new ones",
    ),
    "an attention that is causal by itself": (
        "from_previous",
        "heads_1 = Attention (",
        "heads_1 = Attention <is_causal: int = 1> (",
        "is_causal",
    ),
    "cuts that rank by unlike soft caps": (
        "two_cuts",
        "heads_0 = Attention (",
        "heads_0 = Attention <softcap: float = 9.0> (",
        "unlike softcaps",
    ),
    "an attention without a mask": (
        "from_previous",
        ', "present.1.value", mask)',
        ', "present.1.value")',
        "no mask",
    ),
    "two streams that leave an attention": (
        "from_previous",
        "attended_1 = Add (hidden_1, out_1)",
        FORKED,
        "'heads_rows_0' that enters",
    ),
    "a table of fixed length": (
        "from_previous",
        "hidden_1 = Add (attended_0, active_0)",
        TABLE,
        "'hidden_1' leads to an attention",
    ),
    "keys that the next layer does not make": (
        "from_next",
        '("past_key_values.1.key", key_1)',
        '("past_key_values.1.key", key_0)',
        "'key_0' is not computed",
    ),
    "attention and MLP side by side": (
        "attended",
        "inner_0 = MatMul (attended_0, wm_0)",
        "inner_0 = MatMul (inputs_embeds, wm_0)",
        "layer 0: no single stream of tokens leads from its attention to its MLP",
    ),
    "no MLP between attention and the next": (
        "attended",
        "hidden_1 = Add (attended_0, active_0)",
        "hidden_1 = Add (attended_0, out_0)",
        "layer 0: no single stream",
    ),
    "a fixed number of tokens": (
        "from_previous",
        "float[batch,sequence,4] inputs",
        "float[batch,9,4] inputs",
        "fixed",
    ),
    "no positions": ("from_previous", "position_ids", "places", "no input position_ids"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_cut_is_refused_with_its_name_and_stays_as_it_was(why: str) -> None:
    case, old, new, words = REFUSED[why]
    text = (GRAPHS / case / "before.onnxtxt").read_text(encoding="utf-8")
    assert old in text
    assert_refused(read(text.replace(old, new)), resolved(case), words)


def assert_refused(model: ir.Model, schedule: Resolved, words: str) -> None:
    """An error with a way out, and not one change."""
    was = ir.to_onnx_text(model)
    for tunable in (False, True):
        with pytest.raises(AnalysisError, match=words) as caught:
            InsertCuts(schedule, tunable=tunable)(model)
        assert caught.value.hint
    assert ir.to_onnx_text(model) == was


def test_a_graph_is_cut_once_and_as_deep_as_its_schedule() -> None:
    schedule = resolved("two_cuts")
    assert_refused(before("from_previous"), schedule, "2 attention layers, the model 3")
    assert_refused(cut(before("two_cuts"), schedule), schedule, "cuts already")


def test_no_cut_is_no_change() -> None:
    model = before("two_cuts")
    was = ir.to_onnx_text(model)
    assert not InsertCuts(replace(resolved("two_cuts"), cuts=()))(model).modified
    assert ir.to_onnx_text(model) == was


def test_the_lengths_of_a_stage_are_named_after_those_of_the_graph() -> None:
    text = (GRAPHS / "two_cuts" / "before.onnxtxt").read_text(encoding="utf-8")
    for name, other in (("sequence", "seq_len"), ("past", "past_len"), ("total", "all_len")):
        text = text.replace(f",{name},", f",{other},").replace(f",{name}]", f",{other}]")
    model = cut(read(text), resolved("two_cuts"))
    shapes = {v.name: str(v.shape) for v in (*model.graph.inputs, *model.graph.outputs)}
    assert shapes["past_key_values.1.key"] == "[batch,1,past_len_1,4]"
    assert shapes["past_mask.1"] == "[batch,past_len_2]"
    assert shapes["present.2.value"] == "[batch,1,all_len_2,4]"
    assert shapes["kept.0"] == "[batch,seq_len_1]"
