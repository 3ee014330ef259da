"""Decoders of other exporters, cut: equal to the given one unpruned, to the reference pruned."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from command import vtr
from foreign_parity import IMAGE, STAGES, assert_parity, cut, opened
from int4 import meant, quantise
from written_llama import LAYERS, Style, parts, tiny_llama, write

STYLES = {
    "standard": Style(),
    "standard opset 23, padding mask": Style(opset=23, mask="padding"),
    "grouped": Style("gqa", "simplified", opset=21),
    "grouped, rotary inside": Style("gqa_rotary", "skip", opset=20, positions="none"),
    "grouped, packed": Style("gqa_packed", "skip", opset=18, positions="none"),
    "grouped, lengths as inputs": Style("gqa_rotary", "skip", positions="none", mask="lengths"),
    "multi head": Style("mha", "skip", opset=17),
    "matmul": Style("matmul", "plain", opset=17),
    "matmul opset 13, both scaled": Style("matmul_scaled", "plain", opset=13),
    "matmul, where": Style("matmul", "plain", opset=18, mask="where"),
    "matmul, merged cache": Style("matmul", "plain", cache="merged", opset=16),
    "matmul, turned cache": Style("matmul_scaled", "plain", cache="turned", opset=14),
    "grouped, merged cache": Style("gqa", "rms", cache="merged", opset=23),
    "positions by length": Style("matmul", "plain", opset=17, positions="implied"),
    "positions by counting": Style("matmul", "plain", opset=17, positions="counted"),
    "rotary beside": Style("mha", "skip", opset=19, positions="operator"),
    "token ids": Style("gqa_rotary", "skip", positions="none", source="input_ids"),
    "another name": Style("standard", source="hidden_states"),
}


@pytest.mark.parametrize("name", STYLES)
def test_a_cut_decoder_is_the_reference(name: str, tmp_path: Path) -> None:
    style = STYLES[name]
    model = tiny_llama(style.kv_heads)
    file = tmp_path / "decoder.onnx"
    ir.save(write(model, style), file, external_data="weights.bin")
    assert_parity(cut(file, tmp_path), model)


SCHEDULES = {
    "ranked by the next layer": "score: {from: next}",
    "all text asks, the sharpest head counts": "score: {query: text, heads: max}",
    "inside a layer": "drop_point: inside",
    "positions anew": "positions: repacked",
    "as many as thresholds say": "threshold: {whole: 0.15, single: 0.15}",
}


@pytest.mark.parametrize("what", SCHEDULES)
def test_any_schedule_cuts_a_foreign_decoder(what: str, tmp_path: Path) -> None:
    model, file = tiny_llama(), tmp_path / "decoder.onnx"
    name = "matmul, merged cache" if "next" in what or "inside" in what else "grouped, packed"
    ir.save(write(model, STYLES[name]), file)
    text = STAGES.replace("prefill:", f"prefill:\n  {SCHEDULES[what]}")
    assert_parity(cut(file, tmp_path, text), model)


def test_half_precision_stays_half(tmp_path: Path) -> None:
    model = tiny_llama()
    for style in (
        Style(dtype="float16"),
        Style("gqa_rotary", "skip", opset=20, positions="none", dtype="float16"),
    ):
        file = tmp_path / "decoder.onnx"
        ir.save(write(model, style), file, external_data="weights.bin")
        report = cut(file, tmp_path, force=True)
        assert_parity(report, model, atol=5e-2, dtype=np.float16)


@pytest.mark.parametrize("name", ["grouped, rotary inside", "matmul"])
def test_an_int4_decoder_is_the_reference_with_its_weights(name: str, tmp_path: Path) -> None:
    style, model = STYLES[name], tiny_llama()
    given = tmp_path / "given.onnx"
    ir.save(write(model, style), given, external_data="given.bin")
    file = quantise(given, tmp_path / "int4" / "decoder.onnx")
    weights = meant(file)
    assert len(weights) == 1 + 7 * LAYERS
    for index, layer in enumerate(model.model.layers):
        for part, linear in parts(layer).items():
            linear.weight.data = weights[f"w{part}_{index}"]
    model.lm_head.weight.data = weights["head"]
    assert_parity(cut(file, tmp_path), model)


def test_one_row_at_a_time_is_compared_one_row_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "decoder.onnx"
    model = write(
        tiny_llama(), Style(), **{"float[b,s,32] inputs_embeds": "float[1,s,32] inputs_embeds"}
    )
    ir.save(model, file)
    gates = cut(file, tmp_path).gates
    assert all(gate.passed for gate in gates)
    assert {gate.detail.rpartition(" ")[2] for gate in gates} == {"4"}  # calls of one conversation


def test_how_many_logits_are_made_stays_an_input(tmp_path: Path) -> None:
    file, end = tmp_path / "decoder.onnx", 2**63 - 1
    few = f"""all = Identity (last_normed) none_ = Sub (n0, num_logits_to_keep)
        from = Unsqueeze (none_, i0) far = Constant <value_ints: ints = [{end}]> ()
        some = Slice (all, from, far, i1) logits = MatMul (some, head)"""
    changes = {"logits = MatMul (last_normed, head)": few}
    changes |= {"> g (float": "> g (int64 num_logits_to_keep, float"}
    ir.save(write(tiny_llama(), Style(), **changes), file)
    session = opened(Path(cut(file, tmp_path).artifact) / "decoder.onnx")
    assert session.get_inputs()[0].name == "num_logits_to_keep"


def test_budgets_can_stay_an_input(tmp_path: Path) -> None:
    file = tmp_path / "decoder.onnx"
    ir.save(write(tiny_llama(), Style()), file)
    session = opened(Path(cut(file, tmp_path, tunable=True).artifact) / "decoder.onnx")
    assert {value.name: value.shape for value in session.get_inputs()}["keep"] == [2]


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    file, schedule = tmp_path / "decoder.onnx", tmp_path / "s.yaml"
    ir.save(write(tiny_llama(), STYLES["grouped, packed"]), file)
    schedule.write_text(STAGES)
    command = ["export", "--onnx", file, "--schedule", schedule, "--out", tmp_path / "out"]
    done = vtr(*command, "--image-tokens", IMAGE, "--json")
    said = done.json
    assert [gate["name"] for gate in said["gates"]] == [
        "canonical",
        "keep_all",
        "dropped_as_hidden",
    ]
    assert (done.code, said["layers"], said["verified"]) == (0, LAYERS, True)
    assert said["vision_tokens_per_layer"] == [8, 5, 2]
    assert {"decoder.onnx", "decoder.onnx.data", "schedule.yaml"} == set(said["files"])
    again = vtr(*command, "--image-tokens", IMAGE)
    assert again.code == 2
    assert "--force" in again.err
    assert vtr(*command, "--model", tmp_path).code == 2
    assert vtr("export", "-s", schedule, "-o", tmp_path / "x", "--image-tokens", 3).code == 2
    told = vtr("inspect", tmp_path / "out" / "decoder.onnx", "--json")
    assert told.code == 0, told.err
