"""A cut that can drop nothing is opened: the decoder says the same to the bit, and ranks nothing."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from cut_graphs import Array, Client, Tracer

from vtr_export import compile as compiler
from vtr_export.buildable import opened_cuts
from vtr_export.passes.open_cuts import OpenCuts
from vtr_export.schedule import Keep

ALL = 16  # the tokens of an image
TIDY = (common.RemoveUnusedNodesPass(), common.TopologicalSortPass())
OPTIONS: dict[str, dict[str, Any]] = {
    "previous": {},
    "text_rows": {"query": "text", "heads": "max"},
    "next": {"source": "next"},
    "inside": {"drop_point": "inside"},
    "repacked": {"positions": "repacked"},
}


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def call(rng: np.random.Generator, text: int, vision: int, past: int) -> dict[str, Array]:
    length = text + vision
    return {
        "inputs_embeds": rng.standard_normal((2, length, 32)).astype(np.float32),
        "attention_mask": np.ones((2, past + length), np.int64),
        "position_ids": np.tile(np.arange(past, past + length), (2, 1)),
        "vision_index": np.tile(np.arange(1, vision + 1), (2, 1)),
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_an_open_cut_changes_nothing_but_the_work(name: str, traced: Tracer) -> None:
    tiny = traced("llama")
    closed = tiny.cut(tiny.schedule({1: ALL, 2: 5}, **OPTIONS[name]))
    opened = compiler.run((OpenCuts([0]), *TIDY), closed.clone())
    assert operators(closed).count("VtrTopKPrune") == 2
    assert operators(opened).count("VtrTopKPrune") == 1
    assert len(operators(opened)) < len(operators(closed))
    whole = {node.outputs[0] for node in opened.graph if node.op_type == "VtrColumns"}
    assert len(whole) == 1
    assert not any(set(node.inputs) & whole for node in opened.graph)  # nobody gathers all of it
    for ports in ("inputs", "outputs"):
        names = [[v.name for v in getattr(m.graph, ports)] for m in (opened, closed)]
        assert names[0] == names[1]
    clients, rng = [Client(opened), Client(closed)], np.random.default_rng(0)
    for feeds in (call(rng, 6, ALL, 0), call(rng, 1, 0, 22), call(rng, 3, ALL, 23)):
        ours, theirs = (client(**feeds) for client in clients)
        for output, expected in theirs.items():
            np.testing.assert_array_equal(ours[output], expected, err_msg=output)


def test_numbers_that_are_no_cut_open_nothing(traced: Tracer) -> None:
    tiny = traced("llama")
    model = tiny.cut(tiny.schedule({1: 5}))
    before = operators(model)
    assert not OpenCuts([1, 7])(model).modified
    assert operators(model) == before


def test_which_cuts_can_drop_nothing() -> None:
    half, up = Keep(1, 2), Keep(1, 2, "ceil")
    assert opened_cuts([Keep(144, 144), Keep(143, 144)], 144) == (0,)
    assert opened_cuts([half], 1) == ()  # one token: none survives
    assert opened_cuts([up], 1) == (0,)  # one token: it survives
    assert opened_cuts([up], 2) == ()
    assert opened_cuts([half, up], 0) == (0, 1)  # a profile without images
