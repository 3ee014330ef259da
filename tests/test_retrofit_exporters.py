"""Decoders that transformers' exporter and mobius made, cut."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from foreign_parity import assert_parity, cut
from int4 import packed, quantise
from transformers import DynamicCache, LlamaForCausalLM
from written_llama import HIDDEN, WIDTH, tiny_llama

SAMPLE = Path(__file__).parents[1] / "samples" / "retrofit_int4.py"
mobius = pytest.importorskip("mobius", reason="mobius-onnx is not installed")


def by_mobius(model: LlamaForCausalLM, provider: str, file: Path) -> Path:
    """Operators that ``provider`` is said to run."""
    config = mobius.CausalLMConfig.from_transformers(model.config)
    module = mobius.registry.get("llama")(config)
    package = mobius.build_from_module(module, config, execution_provider=provider)
    mobius.apply_weights(package["model"], module.preprocess_weights(dict(model.state_dict())))
    ir.save(package["model"], file, external_data="weights.bin")
    return file


def by_transformers(model: LlamaForCausalLM, folder: Path, **options: Any) -> Path:
    """Traced with a past, every length symbolic."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    batch, past, new = 2, 3, 5
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        shape = (batch, model.config.num_key_value_heads, past, WIDTH)
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    inputs = {
        "inputs_embeds": torch.randn(batch, new, HIDDEN),
        "attention_mask": torch.ones(batch, past + new, dtype=torch.int64),
        "position_ids": torch.arange(past, past + new).expand(batch, new),
        "past_key_values": cache,
    }
    exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True, **options))
    exported.save_pretrained(folder)
    return folder / "model.onnx"


@pytest.mark.parametrize("provider", ["default", "cpu"])
def test_a_decoder_that_mobius_built(provider: str, tmp_path: Path) -> None:
    model = tiny_llama()
    report = cut(by_mobius(model, provider, tmp_path / "decoder.onnx"), tmp_path)
    assert ("GroupQueryAttention" in report.attention) == (provider == "cpu")
    assert_parity(report, model)


@pytest.mark.filterwarnings("ignore::FutureWarning:copyreg")
@pytest.mark.parametrize("provider", [None, "cpu"])
def test_a_decoder_that_transformers_exported(provider: str | None, tmp_path: Path) -> None:
    """As it is traced, and fused for ONNX Runtime."""
    model = tiny_llama()
    file = by_transformers(model, tmp_path / "exported", ort_fusions=provider)
    report = cut(file, tmp_path)
    assert set(report.attention) == {"MatMul-Softmax-MatMul"}
    domains = {node.domain for node in ir.load(file).graph}
    assert ("com.microsoft" in domains) == (provider == "cpu")
    assert_parity(report, model)


def test_an_int4_decoder_keeps_its_weights(tmp_path: Path) -> None:
    given = by_mobius(tiny_llama(), "cpu", tmp_path / "decoder.onnx")
    file = quantise(given, tmp_path / "int4" / "decoder.onnx")
    report = cut(file, tmp_path)
    before, after = packed(file), packed(Path(report.artifact) / "decoder.onnx")
    assert len(before) >= 3
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == np.uint8
        np.testing.assert_array_equal(after[name], weight)


def test_the_int4_sample_answers_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["retrofit_int4.py", "--out", str(tmp_path), "--count", "4"])
    runpy.run_path(str(SAMPLE), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["int4, all tokens: 4 of 4 right", "int4, cut: 4 of 4 right"]
