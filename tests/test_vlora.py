"""VLoRA: the module beside a plain formulation of it, and its artifact beside the module."""

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny_vlora
import torch
from PIL import Image
from tiny_models import EOS
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from vtr_export import Artifact, Schedule, export
from vtr_export.checkpoint import read_model_facts
from vtr_export.errors import InputError, ScheduleError
from vtr_export.memory import parameters
from vtr_export.models import VLoRAForConditionalGeneration
from vtr_export.models.vlora import Block
from vtr_export.plan import plan
from vtr_export.runtime.artifact import Request
from vtr_export.runtime.sampling import Options

QUESTIONS, STEPS = ("what colour is the digit ?", "how many are there"), 16


class Beside(nn.Module):
    """A module, and a matrix beside it."""

    def __init__(self, own: nn.Module, matrix: Tensor) -> None:
        super().__init__()
        self.own, self.matrix = own, matrix

    def forward(self, rows: Tensor) -> Tensor:
        return self.own(rows) + rows @ self.matrix.T


def dense(model: VLoRAForConditionalGeneration, weights: Tensor) -> LlamaForCausalLM:
    """LLaMA whose matrices are W + alpha / rank B Aᵀ, for one image's ``A`` [groups, 5, d, rank]."""
    llama = LlamaForCausalLM(model.config.text_config).eval()
    own = model.language_model.state_dict()
    own = {f"model.{name}": values for name, values in own.items() if "low_rank" not in name}
    llama.load_state_dict(own | {"lm_head.weight": model.lm_head.weight})
    for group, number in enumerate((1, 3)):  # every second layer
        layer, low = llama.model.layers[number], model.language_model.layers[number].low_rank
        change = {
            kind: 6 / 4 * low[kind] @ weights[group, place].T for place, kind in enumerate("qkvom")
        }
        for kind in "qkvo":
            getattr(layer.self_attn, f"{kind}_proj").weight.data += change[kind]
        layer.mlp = Beside(layer.mlp, change["m"])
    return llama


@torch.no_grad()
def test_an_image_changes_the_matrices_of_every_second_layer() -> None:
    model, ids = tiny_vlora.tiny_vlora(), torch.arange(5, 23).view(2, 9)
    weights = model.get_vision_weights(torch.randn(2, 3, 28, 28))
    assert weights.shape == (2, 2, 5, 32, 4)
    together = model(input_ids=ids, vision_weights=weights).logits
    for row in range(2):
        alone = dense(model, weights[row])(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(together[row : row + 1], alone, atol=3e-4, rtol=0)
    without = model(input_ids=ids).logits
    assert (without - together).abs().max() > 0.1
    plain = dense(model, torch.zeros_like(weights[0]))(input_ids=ids).logits
    torch.testing.assert_close(without, plain, atol=3e-4, rtol=0)


@torch.no_grad()
def test_a_block_is_a_decoder_layer_normed_first() -> None:
    block = Block(16, 2, 4)
    torchs = nn.TransformerDecoderLayer(
        16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    for mine, theirs in (
        (block.self_attn, torchs.self_attn),
        (block.cross_attn, torchs.multihead_attn),
    ):
        parts = [mine.q, mine.k, mine.v]
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        theirs.out_proj.load_state_dict(mine.out.state_dict())
    for mine, theirs in zip(
        (block.fc1, block.fc2, block.norm1, block.norm2, block.norm3),
        (torchs.linear1, torchs.linear2, torchs.norm1, torchs.norm2, torchs.norm3),
        strict=True,
    ):
        mine.load_state_dict(
            {name: torch.randn_like(value) / 4 for name, value in mine.state_dict().items()}
        )
        theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    queries, features = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    torch.testing.assert_close(block(queries, features), torchs.eval()(queries, features))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlora") / "checkpoint"
    tiny_vlora.save(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    export(Schedule.unpruned(), checkpoint, checkpoint.parent / "artifact", verify="all")
    return checkpoint.parent / "artifact"


def test_a_schedule_with_a_prefill_part_is_refused_with_the_reason(checkpoint: Path) -> None:
    with pytest.raises(ScheduleError, match="has no token in the prompt to drop"):
        export(Schedule.fastv(1, "50%"), checkpoint, checkpoint.parent / "none")
    facts = read_model_facts(checkpoint)
    assert plan(Schedule.unpruned(), facts).vision_tokens_per_layer == (0,) * 4


def test_the_facts_count_its_parameters(checkpoint: Path) -> None:
    model = tiny_vlora.tiny_vlora()
    layers = model.vision_tower.encoder.layers
    unused = [model.vision_tower.post_layernorm, layers[-1]]  # features are of the last but one
    count = sum(p.numel() for p in model.parameters())
    count -= sum(p.numel() for part in unused for p in part.parameters())
    assert parameters(read_model_facts(checkpoint)).total == count


def test_every_gate_passes(exported: Path) -> None:
    manifest = Artifact.load(exported).manifest
    assert manifest.verified
    assert manifest.model.features == "weights"
    names = {gate.name for gate in manifest.gates}
    assert {"pixel_values", "vision_encoder.cosine", "free.decode.difference"} <= names


def pictures() -> list[Image.Image]:
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (41, 60, 3), dtype=np.uint8))
        for seed in range(2)
    ]


@pytest.mark.parametrize("rows", [(0,), (1,), (0, 1)])
def test_each_row_is_answered_by_its_own_image(exported: Path, rows: tuple[int, ...]) -> None:
    artifact, model = Artifact.load(exported, threads=1), tiny_vlora.tiny_vlora()
    requests = [Request(QUESTIONS[row], [pictures()[row]]) for row in rows]
    prepared = artifact.prepare(requests)
    assert prepared.images is not None
    answers = artifact.generate_batch(requests, Options(STEPS))
    for number, (answer, row) in enumerate(zip(answers, prepared.rows, strict=True)):
        pixels = torch.as_tensor(prepared.images.feeds["pixel_values"][number : number + 1])
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            said = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                vision_weights=model.get_vision_weights(pixels),
                max_new_tokens=STEPS,
                do_sample=False,
                eos_token_id=EOS,
            )
        expected = [token for token in said[0, ids.shape[1] :].tolist() if token != EOS]
        assert list(answer.token_ids) == expected
        assert answer.vision_tokens == 0


def test_a_prompt_without_an_image_is_answered_by_plain_llama(exported: Path) -> None:
    artifact, model = Artifact.load(exported, threads=1), tiny_vlora.tiny_vlora()
    prepared = artifact.prepare([Request(QUESTIONS[0], ())])
    ids = torch.tensor([prepared.rows[0].ids])
    with torch.no_grad():
        expected = int(model(input_ids=ids).logits[0, -1].argmax())
    assert artifact.generate((), QUESTIONS[0], max_new_tokens=1).token_ids == (expected,)


def test_two_images_for_one_prompt_are_refused(exported: Path) -> None:
    with pytest.raises(InputError, match="sees one of each"):
        Artifact.load(exported, threads=1).generate(pictures(), QUESTIONS[0])
