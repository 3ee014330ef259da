"""mPLUG-Owl3's hyper attention: the module beside its definition spelled out, and its artifact."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hyper
import torch
from PIL import Image
from tiny_models import EOS, IMAGE
from torch import Tensor
from transformers import AttentionInterface, Qwen2ForCausalLM

from vtr_export import Artifact, Schedule, export
from vtr_export.checkpoint import read_model_facts
from vtr_export.errors import InputError, ScheduleError
from vtr_export.memory import parameters
from vtr_export.models import MPlugOwl3ForConditionalGeneration
from vtr_export.runtime.artifact import Request
from vtr_export.runtime.sampling import Options

QUESTION, STEPS = "what colour is the digit ?", 16


def turned(keys: Tensor, place: int) -> Tensor:
    """Rotary angles as complex numbers: ``keys`` ``[..., d]`` at one position."""
    half = keys.shape[-1] // 2
    angles = place * 10000.0 ** (-torch.arange(half) / half)
    spun = torch.complex(keys[..., :half], keys[..., half:]) * torch.polar(torch.ones(half), angles)
    return torch.cat((spun.real, spun.imag), -1)


@torch.no_grad()
def spelled_out(
    model: MPlugOwl3ForConditionalGeneration, ids: Sequence[int], pixels: Tensor
) -> Tensor:
    """Logits [S, vocab] of one row by plain Qwen2, one query and one head at a time."""
    places = [place for place, token in enumerate(ids) if token == IMAGE]
    hidden = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    features = model.vision2text_model(hidden)  # [images, L, D]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        mixed = torch.zeros_like(query)
        hyper = module.layer_idx + 1 in tiny_hyper.LAYERS
        own = model.language_model.layers[module.layer_idx].self_attn
        for row in range(query.shape[2]):
            for head in range(query.shape[1]):
                group = head // module.num_key_value_groups
                keys, values = key[0, group, : row + 1], value[0, group, : row + 1]
                for place, feature in zip(places, features, strict=True):
                    if not hyper or row < place:
                        continue
                    both = own.v_kv_proj(feature).view(len(feature), -1, 2, module.head_dim)
                    keys = torch.cat((turned(both[:, group, 0], place), keys))
                    values = torch.cat((both[:, group, 1], values))
                logits = keys @ query[0, head, row] * module.head_dim**-0.5
                mixed[0, head, row] = logits.softmax(0) @ values
        return mixed.transpose(1, 2), None

    AttentionInterface.register("spelled_out", attend)
    qwen = Qwen2ForCausalLM(model.config.text_config).eval()
    state = model.language_model.state_dict()
    state = {f"model.{name}": values for name, values in state.items() if "v_kv_proj" not in name}
    qwen.load_state_dict(state | {"lm_head.weight": model.lm_head.weight})
    before = qwen.config._attn_implementation
    qwen.config._attn_implementation = "spelled_out"
    try:
        return qwen(input_ids=torch.tensor([list(ids)])).logits[0]
    finally:
        qwen.config._attn_implementation = before


ROWS = ((1, 7, IMAGE, 9, 11, IMAGE, 12, 20), (1, IMAGE, 6, 30))  # two images, and one


@torch.no_grad()
def test_images_are_keys_of_the_rows_behind_them() -> None:
    model, pixels = tiny_hyper.tiny_owl(), torch.randn(3, 3, 28, 28)
    width = max(map(len, ROWS))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in ROWS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ROWS])
    _, beside = model.beside(pixels, ids, mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    said = model(input_ids=ids, attention_mask=mask, position_ids=positions, **beside).logits
    for number, (row, own) in enumerate(zip(ROWS, (pixels[:2], pixels[2:]), strict=True)):
        expected = spelled_out(model, row, own)
        torch.testing.assert_close(said[number, -len(row) :], expected, atol=1e-4, rtol=1e-4)
    blind = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(blind[0, :2], said[0, :2], atol=1e-5, rtol=0)  # before any image
    assert (blind[0, 2:] - said[0, 2:]).abs().amax(-1).min() > 1e-2


@torch.no_grad()
def test_steps_with_a_cache_see_every_image() -> None:
    model, pixels = tiny_hyper.tiny_owl(), torch.randn(2, 3, 28, 28)
    ids = torch.tensor([ROWS[0]])
    _, beside = model.beside(pixels, ids, torch.ones_like(ids))
    said = model(input_ids=ids[:, :-1], use_cache=True, **beside)
    step = model(input_ids=ids[:, -1:], past_key_values=said.past_key_values, **beside)
    expected = spelled_out(model, ROWS[0], pixels)[-1]
    torch.testing.assert_close(step.logits[0, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("owl") / "checkpoint"
    tiny_hyper.save(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    export(Schedule.unpruned(), checkpoint, checkpoint.parent / "artifact", verify="all")
    return checkpoint.parent / "artifact"


def test_cuts_of_such_keys_are_refused_with_the_reason(checkpoint: Path) -> None:
    with pytest.raises(ScheduleError, match="keys beside those of text"):
        export(Schedule.fastv(1, "50%"), checkpoint, checkpoint.parent / "none")


def test_the_facts_count_its_parameters(checkpoint: Path) -> None:
    model = tiny_hyper.tiny_owl()
    unused = [model.vision_tower.post_layernorm, model.vision_tower.encoder.layers[-1]]
    count = sum(p.numel() for p in model.parameters())
    count -= sum(p.numel() for part in unused for p in part.parameters())
    assert parameters(read_model_facts(checkpoint)).total == count


def test_every_gate_passes(exported: Path) -> None:
    manifest = Artifact.load(exported).manifest
    assert manifest.verified
    assert manifest.model.features == "keys"
    names = {gate.name for gate in manifest.gates}
    assert {"pixel_values", "vision_encoder.cosine", "free.decode.difference"} <= names


def pictures(count: int) -> list[Image.Image]:
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (41, 60, 3), dtype=np.uint8))
        for seed in range(count)
    ]


@pytest.mark.parametrize("counts", [(1,), (2, 1), (0, 1)])
def test_rows_with_unlike_images_are_answered_as_the_definition_does(
    exported: Path, counts: tuple[int, ...]
) -> None:
    artifact, model = Artifact.load(exported, threads=1), tiny_hyper.tiny_owl()
    requests = [Request(QUESTION, pictures(2)[:count]) for count in counts]
    prepared = artifact.prepare(requests)
    assert prepared.images is not None
    pixels, start = torch.as_tensor(prepared.images.feeds["pixel_values"]), 0
    answers = artifact.generate_batch(requests, Options(STEPS))
    for answer, row, count in zip(answers, prepared.rows, counts, strict=True):
        own = pixels[start : start + count]
        assert list(answer.token_ids) == greedy(model, row.ids, own)
        start += count


@torch.no_grad()
def greedy(
    model: MPlugOwl3ForConditionalGeneration, prompt: Sequence[int], pixels: Tensor
) -> list[int]:
    """Without a cache; the tokens before the one that ends the answer."""
    ids, tokens = torch.tensor([prompt]), list[int]()
    beside = model.beside(pixels, ids, torch.ones_like(ids))[1] if len(pixels) else {}
    while len(tokens) < STEPS:
        token = int(model(input_ids=ids, **beside).logits[0, -1].argmax())
        if token == EOS:
            break
        tokens.append(token)
        ids = torch.cat((ids, torch.tensor([[token]])), 1)
    return tokens


def test_an_image_of_a_later_turn_is_refused(exported: Path) -> None:
    artifact = Artifact.load(exported, threads=1)
    prepared = artifact.prepare([Request(QUESTION, pictures(1))])
    assert prepared.images is not None
    model, features = artifact.model, artifact.model.encode(prepared.images.feeds).features
    batch = model.pad([prepared.rows[0].ids])
    step = model.prefill(model.decoder.empty(1), batch, features)
    with pytest.raises(InputError, match="a later turn brings an image"):
        model.prefill(step.cache, batch, features)
