"""A loop that is written out computes what it computed; one of unknown length is left to others."""

import numpy as np
import onnx_ir as ir
import pytest
from graph_texts import Session, graph

from vtr_export.errors import AnalysisError
from vtr_export.passes.unroll_loops import UnrollLoops

BODY = """
  rounds = Constant <value_ints: ints = [{rounds}]> ()
  steps = Squeeze (rounds)
  going = Constant <value: tensor = bool {{1}}> ()
  one = Constant <value_int: int = 1> ()
  y, total = Loop <body: graph = round (int64 number, bool condition, int64[N] a, int64[N] b)
                => (bool again, int64[N] more, int64[N] sum)
  {{
    again = {again}
    place = Add (number, one)
    more = Mul (a, place)
    sum = Add (b, more)
  }}> (steps, going, x, x)
"""
SIGNATURE = "(int64[N] x) => (int64[N] y, int64[N] total)"


def looped(rounds: int = 4, again: str = "Identity (condition)") -> ir.Model:
    return graph(SIGNATURE, BODY.format(rounds=rounds, again=again))


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_every_round_reads_what_the_one_before_gave(rounds: int) -> None:
    model = looped(rounds)
    assert UnrollLoops()(model).modified
    assert "Loop" not in {node.op_type for node in model.graph}
    assert not UnrollLoops()(model).modified
    x = np.array([2, 3, 5])
    a, total = x, x
    for number in range(rounds):
        a = a * (number + 1)
        total = total + a
    found = Session(model)({"x": x})
    assert found["y"].tolist() == a.tolist()
    assert found["total"].tolist() == total.tolist()


def test_a_function_that_loops_is_written_out_where_it_is_called() -> None:
    body = "three = Constant <value_ints: ints = [3]> () y = vtr.VtrFarthest (x, three)"
    model = graph("(float[I,N,N] x) => (int64[I,K] y)", body)
    points = np.random.default_rng(0).normal(size=(2, 7, 4)).astype(np.float32)
    points /= np.linalg.norm(points, axis=-1, keepdims=True)
    feeds = {"x": points @ points.transpose(0, 2, 1)}
    before = Session(model)(feeds)["y"]
    UnrollLoops()(model)
    nodes = [*model.graph, *(node for function in model.functions.values() for node in function)]
    assert "Loop" not in {node.op_type for node in nodes}
    assert np.array_equal(Session(model)(feeds)["y"], before)


def test_a_loop_that_may_end_earlier_is_refused() -> None:
    with pytest.raises(AnalysisError, match="condition"):
        UnrollLoops()(looped(again="Not (condition)"))


def test_rounds_that_are_no_constant_are_refused() -> None:
    body = BODY.format(rounds=1, again="Identity (condition)").replace("(rounds)", "(given)")
    with pytest.raises(AnalysisError, match="constant"):
        UnrollLoops()(graph(SIGNATURE.replace("x)", "x, int64[1] given)", 1), body))
