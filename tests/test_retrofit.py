"""Decoders of other exporters, cut: equal to the given one unpruned, to the reference pruned."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from foreign_parity import assert_parity, cut
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


@pytest.mark.parametrize("name", ["grouped, rotary inside", "matmul", "standard"])
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
