"""What inspection says of decoders whose making is known, in any operators."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from command import vtr
from foreign_decoders import KINDS, foreign
from random_decoders import Decoder, Random, build, drawn

from vtr_export.graph_facts import GraphFacts
from vtr_export.inspection import inspect_file
from vtr_export.passes.insert_cuts import InsertCuts
from vtr_export.schedule import Cut, Keep, Resolved

SEEDS = 6


def a_decoder(seed: int, form: str) -> Decoder:
    it = replace(drawn(np.random.default_rng(seed)), stand_in=False, output_gate=False)
    it = replace(it, value_width=it.head_width, grouped=False)
    return replace(it, group=1) if form == "multi_head" else it


def inspected(model: ir.Model, folder: Path) -> GraphFacts:
    ir.save(model, folder / "model.onnx")
    return inspect_file(folder / "model.onnx")


@pytest.mark.parametrize("form", KINDS)
def test_layers_of_any_attention(form: str, tmp_path: Path) -> None:
    for seed in range(SEEDS):
        it = a_decoder(seed, form)
        found = inspected(foreign(it, Random(seed, it.dtype), form), tmp_path)
        assert [layer.index for layer in found.layers] == list(range(it.layers))
        told = {(layer.attention, layer.heads, layer.kv_heads) for layer in found.layers}
        assert told == {(KINDS[form], it.heads, it.kv_heads)}
        prefix = "past_key_values" if form == "outside" else "past"
        pasts = [layer.past_key for layer in found.layers]
        assert pasts == [f"{prefix}.{n}.key" for n in range(it.layers)]
        assert all(layer.entry for layer in found.layers)


def test_what_an_attention_does_beside(tmp_path: Path) -> None:
    it = a_decoder(0, "grouped")
    (grouped,) = {
        each.traits for each in inspected(foreign(it, Random(0), "grouped"), tmp_path).layers
    }
    assert set(grouped) == {"causal", "window 7"}
    (packed,) = {
        each.traits for each in inspected(foreign(it, Random(0), "packed"), tmp_path).layers
    }
    assert set(packed) == {"causal", "rotary inside"}
    chosen = inspected(foreign(it, Random(0), "chosen"), tmp_path)
    assert [(mask.made_by, len(mask.layers)) for mask in chosen.masks] == [
        ("vtr::VtrCausalMask", it.layers)
    ]


def test_streams_of_a_decoder(tmp_path: Path) -> None:
    it = Decoder(layers=3, planes=2, tables="given")
    streams = {each.name: each for each in inspected(build(it, Random(0)), tmp_path).streams}
    residual = [each for each in streams.values() if each.kind == "residual"]
    assert [(each.axis, each.layers) for each in residual] == [(1, (1,)), (1, (2,))]
    assert streams["deepstack.1"].axis == 1
    assert streams["deepstack.1"].layers == (1,)
    assert "deepstack.0" not in streams
    tables = {(streams[name].axis, streams[name].layers) for name in ("cos", "sin")}
    assert tables == {(1, (1, 2))}


def test_a_stream_that_is_lost_is_said_to_be(tmp_path: Path) -> None:
    from losing_decoders import losing

    model = losing(Decoder(layers=3), 0, "folded", 1)
    found = inspected(model, tmp_path)
    assert found.why_no_cuts
    assert found.lost[0].operator == "Reshape"
    assert {each.axis for each in found.streams if each.kind == "lost"} <= {None}
    assert len(found.layers) == 3


def test_stages_of_a_graph_with_cuts(tmp_path: Path) -> None:
    model = build(Decoder(layers=4), Random(0))
    schedule = Resolved(4, 4, (Cut(1, Keep(3, 4)), Cut(3, Keep(1, 4))))
    assert [(s.first_layer, s.layers, s.keep) for s in inspected(model, tmp_path).stages] == [
        (0, 4, "all")
    ]
    InsertCuts(schedule)(model)
    model.graph.sort()
    found = inspected(model, tmp_path)
    stages = [(s.first_layer, s.layers, s.keep) for s in found.stages]
    assert stages == [(0, 1, "all"), (1, 2, "3 of 4"), (3, 1, "1 of 4")]
    assert [mask.layers for mask in found.masks] == [(0,), (1, 2), (3,)]


def test_a_script_finds_layers_streams_and_stages_at_the_top(tmp_path: Path) -> None:
    it = a_decoder(3, "grouped")
    ir.save(foreign(it, Random(3, it.dtype), "grouped"), tmp_path / "model.onnx")
    said: dict[str, Any] = vtr("inspect", tmp_path / "model.onnx", "--json").json
    assert [layer["index"] for layer in said["layers"]] == list(range(it.layers))
    assert {"attention", "heads", "kv_heads"} <= said["layers"][0].keys()
    assert {"name", "axis"} <= said["streams"][0].keys()
    assert said["stages"] == [{"first_layer": 0, "layers": it.layers, "keep": "all"}]
    text = vtr("inspect", tmp_path / "model.onnx").out
    assert f"{it.heads} on {it.kv_heads}" in text
    assert "no cut can be made as it stands" in text
    assert json.dumps(said["masks"])


def test_a_graph_without_attention_says_so(tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 20]> g (float[b,s,4] x) => (float[b,s,4] y) { y = Tanh (x) }'
    )
    found = inspected(model, tmp_path)
    assert (found.layers, found.streams, found.stages) == ((), (), ())
    assert "inputs_embeds" in found.why_no_cuts
