"""Decoders with streams, caches and positions of their own: traced forms beside transformers'."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DeepseekV3Config, DynamicCache, Llama4TextConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)
from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeTextConfig,
)
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeBlock
from transformers.models.hunyuan_vl.configuration_hunyuan_vl import HunYuanVLTextConfig
from transformers.models.hunyuan_vl.modeling_hunyuan_vl import HunYuanVLRotaryEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe, apply_rotary_emb

from vtr_export.families import read_facts
from vtr_export.frontends.experts import open_experts
from vtr_export.frontends.latent import expand_early
from vtr_export.frontends.mrope import straighten
from vtr_export.frontends.pairs import Pairs
from vtr_export.inspection import inspect_file
from vtr_export.runtime.batch import pad_batch, token_groups

BENCH = Path(__file__).parents[1] / "samples" / "bench"
EXPERTS = {"hidden_size": 16, "num_experts_per_tok": 2}


def drawn(module: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    return module.eval()


def opened(block: nn.Module) -> Any:
    model = nn.ModuleDict({"mlp": block})
    open_experts(model, dict(model.named_parameters()), FakeTensorMode())
    return block


def test_experts_that_weigh_what_goes_in_are_transformers_own() -> None:
    config = Llama4TextConfig(**EXPERTS, num_local_experts=4, intermediate_size=8)
    block, rows = drawn(Llama4TextMoe(config)), torch.randn(2, 5, 16)
    theirs, _ = block(rows.clone())
    mine, _ = opened(block)(rows)
    torch.testing.assert_close(mine.flatten(0, 1), theirs)


@pytest.mark.parametrize("marks", [[0, 1, 1, 0, 0], [0] * 5, [1] * 5])
def test_text_and_images_have_experts_of_their_own(marks: list[int]) -> None:
    config = Ernie4_5_VLMoeTextConfig(**EXPERTS, moe_num_experts=4, moe_intermediate_size=[8, 4])
    block, rows = drawn(Ernie4_5_VLMoeMoeBlock(config)), torch.randn(2, 5, 16)
    types = torch.tensor([marks, marks[::-1]])
    theirs, _ = block(rows, types)
    mine, _ = opened(block)(rows, types != 0)
    torch.testing.assert_close(mine, theirs)


def test_complex_rotations_are_those_of_pairs() -> None:
    query, key, angles = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8), torch.randn(2, 3, 4)

    def rotated() -> tuple[Tensor, Tensor]:
        return apply_rotary_emb(query, key, torch.polar(torch.ones_like(angles), angles) * 0.5)

    theirs = rotated()
    with Pairs():
        mine = rotated()
    for own, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own, other)


def test_latent_attention_keeps_keys_and_values() -> None:
    config = DeepseekV3Config(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8,
        kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6,
    )  # fmt: skip
    config._attn_implementation = "eager"
    attention, tables = drawn(DeepseekV3Attention(config, 0)), DeepseekV3RotaryEmbedding(config)
    rows = torch.randn(1, 7, 16)

    def said() -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache(config=config)
        parts = []
        for first, last in ((0, 4), (4, 7)):
            places = torch.arange(first, last)[None]
            own = tables(rows, places)
            parts.append(attention(rows[:, first:last], own, None, past_key_values=cache)[0])
        return torch.cat(parts, 1), cache

    theirs, _ = said()
    model = nn.ModuleDict({"attention": attention})
    expand_early(model)
    mine, cache = said()
    torch.testing.assert_close(mine, theirs)
    assert cache.layers[0].keys.shape == (1, 2, 7, 8)
    assert cache.layers[0].values.shape == (1, 2, 7, 6)


def test_four_sections_are_put_together_by_transformers_rule() -> None:
    sections = {"mrope_section": [1, 2, 2, 3], "rope_type": "default", "rope_theta": 1e4}
    rotary = HunYuanVLRotaryEmbedding(HunYuanVLTextConfig(head_dim=16, rope_parameters=sections))
    angles = torch.randn(4, 2, 5, 8)
    theirs = rotary.recomposition_frequencies(angles)
    decoder: Any = nn.Module()
    decoder.rotary_emb = rotary
    straighten(decoder, 4)
    assert rotary.recomposition_frequencies(angles).equal(theirs)


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        ("kimi_k25", {"kv_heads": 128, "head_dim": 192, "value_dim": 128}),
        ("llama4", {"context": 8191, "window": 8191}),  # where queries begin to be scaled
        ("granite4_vision", {"planes": (11, 14, 17, 20)}),  # laid over layers 12, 15, 18, 21
        ("unlimited_ocr", {"answer": 128, "window": None, "context": 32768}),
        ("ernie4_5_vl_moe", {"marked": (100295, 101304, 101305), "sections": 3}),
    ],
)
def test_facts_of_the_defaults(kind: str, facts: dict[str, Any]) -> None:
    found = read_facts({"model_type": kind}, "config.json")
    assert {name: getattr(found, name) for name in facts} == facts


def test_marked_tokens_see_no_more_than_others() -> None:
    batch = pad_batch([[1, 7, 8, 8, 9], [8, 2]], 8, 8)
    assert token_groups(batch, 8, "causal", (7, 8, 9)).tolist() == [[0, -1, -1, -1, -1],
                                                                    [0, 0, 0, -1, 0]]  # fmt: skip
    assert not np.any(token_groups(batch, 8, "causal"))


@pytest.mark.parametrize(("name", "stream"), [("ernie4_5_vl_moe", "token_groups")])
def test_cuts_narrow_the_stream_and_the_artifact_is_verified(
    name: str, stream: str, tmp_path: Path
) -> None:
    """Of one; `samples/bench/coverage.py` has them all."""
    code = "import json, pathlib, sys; sys.path.append(sys.argv[3]); "
    code += "from coverage_one import examine; "
    code += "print(json.dumps(examine(sys.argv[1], pathlib.Path(sys.argv[2]))))"
    command = [sys.executable, "-c", code, name, tmp_path, Path(__file__).parent]
    done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["verdict"] == "verified with cuts", found
    first, *_ = inspect_file(tmp_path / "pruned/onnx/decoder_model_merged.onnx").cuts
    assert stream in first.streams
