"""Qwen's vision-language models: what is theirs alone."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny_qwen
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2_5_VLTextModel,
    Qwen2VLImageProcessorPil,
    Qwen3VLTextModel,
    vision_utils,
)

from vtr_export import Artifact, Schedule, export
from vtr_export.backends.tensorrt.profiles import vision_profile
from vtr_export.checkpoint import Checkpoint
from vtr_export.engine_manifest import Ranges
from vtr_export.errors import AnalysisError, ArtifactError, InputError
from vtr_export.families import read_facts
from vtr_export.frontends.mrope import straighten
from vtr_export.memory import parameters
from vtr_export.passes.add_planes import AddPlanes
from vtr_export.runtime.conversation import Conversation
from vtr_export.runtime.images import packed
from vtr_export.runtime.images.kinds import parse_kind
from vtr_export.schedule import Resolved
from vtr_export.search.evaluators.torch_model import TorchModel
from vtr_export.search.questions.calibration import Question
from vtr_export.verify.first_layers import truncate
from vtr_export.verify.processors import load_processor

# config.json of Qwen2.5-VL-3B-Instruct and Qwen2-VL-2B-Instruct, as published, with fewer layers
FLAT: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "vision_config": {
            "depth": 2, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
            "num_heads": 16, "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14,
            "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 128000,
        "max_window_layers": 70, "num_attention_heads": 16, "num_hidden_layers": 3,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "qwen2_vl": {
        "vision_config": {
            "depth": 2, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
            "hidden_size": 1536, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "temporal_patch_size": 2,
        },
        "hidden_size": 1536, "intermediate_size": 8960, "max_position_embeddings": 32768,
        "max_window_layers": 28, "num_attention_heads": 12, "num_hidden_layers": 3,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
}  # fmt: skip
TOP: dict[str, Any] = {
    "image_token_id": 151655, "vision_start_token_id": 151652, "sliding_window": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1000000.0,
}  # fmt: skip


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("named", [True, False])
def test_a_file_of_the_hub_has_the_decoder_at_the_top(kind: str, named: bool) -> None:
    config = {"model_type": kind, **TOP, **FLAT[kind]}
    if named:  # as transformers 4 wrote it
        config["vision_config"] = {**config["vision_config"], "model_type": kind}
    facts = read_facts(config, "config.json")
    own = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(own)
    assert facts.tied
    assert facts.context == config["max_position_embeddings"]
    assert parameters(facts).total == sum(weight.numel() for weight in model.parameters())


GRIDS = [(1, 6, 8), (1, 2, 2), (2, 10, 4), (1, 14, 18)]


def test_patches_stand_where_transformers_says() -> None:
    own = vision_utils.get_vision_position_ids(torch.tensor(GRIDS), 2)
    assert packed.positions(GRIDS, 2).tolist() == own.tolist()


@pytest.mark.parametrize("grids", [GRIDS, GRIDS[1:2]])
def test_a_frame_sees_itself(grids: list[tuple[int, int, int]]) -> None:
    ends = vision_utils.get_vision_cu_seqlens(torch.tensor(grids)).tolist()
    expected = [list(range(*span)) for span in pairwise(ends)]
    assert groups(packed.frames(grids, 2), "frame") == expected


@pytest.mark.parametrize("grids", [GRIDS, GRIDS[1:2]])
def test_windows_are_those_of_transformers(grids: list[tuple[int, int, int]]) -> None:
    order, ends = vision_utils.get_vision_window_index(torch.tensor(grids), 2, 24, 4)
    patches = (order[:, None] * 4 + torch.arange(4)).flatten().tolist()
    expected = [patches[slice(*span)] for span in pairwise(ends.tolist())]
    assert groups(packed.windows(grids, 2, 3), "window") == expected


def groups(feeds: dict[str, Any], name: str) -> list[list[int]]:
    """Rows without their gaps; places must lead back to each patch."""
    rows = feeds[f"{name}s"]
    places = feeds[f"{name}_places"].reshape(-1)
    assert rows.reshape(-1)[places].tolist() == list(range(len(places)))
    return [row[row >= 0].tolist() for row in rows]


def test_learned_positions_are_blended_as_transformers_blends_them() -> None:
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        torch.tensor(GRIDS), 7, align_corners=True, spatial_merge_size=2
    )
    ours = packed.between(GRIDS, 2, 7)
    assert ours["interp_indices"].reshape(-1, 4).tolist() == indices.tolist()
    assert np.abs(ours["interp_weights"].reshape(-1, 4) - weights.numpy()).max() < 1e-6


@pytest.mark.parametrize(
    "limits",
    [
        {"min_pixels": 3000, "max_pixels": 9000},
        {"size": {"shortest_edge": 3000, "longest_edge": 9000}},
        {"size": {"min_pixels": 1, "max_pixels": 2}, "min_pixels": 3000, "max_pixels": 9000},
        {},
    ],
)
@pytest.mark.parametrize("size", [(5, 300), (61, 61), (400, 90), (1, 150)])
def test_limits_of_pixels_are_read_in_every_spelling(
    limits: dict[str, Any], size: tuple[int, int]
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    kind = parse_kind({"image_processor_type": "Qwen2VLImageProcessorFast", **limits}, "x")
    own = Qwen2VLImageProcessorPil(**limits)(images=image, return_tensors="np")
    facts = read_facts({"model_type": "qwen2_vl"}, "x")
    inputs = kind.inputs([image], facts)
    assert np.array_equal(inputs.given["pixel_values"], own["pixel_values"])
    assert np.array_equal(inputs.given["image_grid_thw"], own["image_grid_thw"])
    assert inputs.tokens == own["image_grid_thw"].prod() // 4


@pytest.mark.parametrize(
    ("config", "size", "said"),
    [
        ({}, (1, 201), "201 times"),
        ({"do_resize": False}, (28, 30), "no whole patches"),
        ({"patch_size": 16}, (28, 28), "another checkpoint"),
        ({"size": {"shortest_edge": 3000}}, (28, 28), "make no sense"),
        ({"min_pixels": 9, "max_pixels": 3}, (28, 28), "9 to 3 pixels"),
        ({"do_sharpen": True}, (28, 28), "do_sharpen"),
    ],
)
def test_what_cannot_be_prepared_is_refused(
    config: dict[str, Any], size: tuple[int, int], said: str
) -> None:
    def prepare() -> None:
        kind = parse_kind({"image_processor_type": "Qwen2VLImageProcessor", **config}, "x")
        kind.inputs([Image.new("RGB", size)], read_facts({"model_type": "qwen2_vl"}, "x"))

    with pytest.raises((InputError, ArtifactError)) as caught:
        prepare()
    assert said in str(caught.value)


def test_an_image_can_be_seen_as_the_model_sees_it() -> None:
    kind = parse_kind({"image_processor_type": "Qwen2VLImageProcessor"}, "x")
    pictures = [Image.effect_noise((56, 84), 60).convert("RGB") for _ in range(2)]  # as they are
    inputs = kind.inputs(pictures, read_facts({"model_type": "qwen2_vl"}, "x"))
    for number, picture in enumerate(pictures):
        assert np.array_equal(np.asarray(kind.view(inputs, number)), np.asarray(picture))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_table_is_chosen_as_the_model_writes_it(kind: str) -> None:
    make = {"qwen2_5_vl": Qwen2_5_VLTextModel, "qwen3_vl": Qwen3VLTextModel}[kind]
    text = tiny_qwen.text_config() if kind == "qwen2_5_vl" else tiny_qwen.text_3()
    decoder = make(make.config_class(**text))
    angles = torch.randn(3, 2, 5, tiny_qwen.HEAD_DIM // 2)
    own = decoder.rotary_emb.recomposition_frequencies(angles.clone())
    straighten(decoder)
    assert decoder.rotary_emb.recomposition_frequencies(angles).equal(own)


def test_planes_need_a_layer_behind_them() -> None:
    graph = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 24}), ir_version=10)
    with pytest.raises(AnalysisError, match="3 planes"):
        AddPlanes(range(3))(graph)


def test_a_second_turn_with_an_image_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    model = tiny_qwen.qwen2_5_vl(tmp_path / "checkpoint")
    with torch.no_grad():
        model.lm_head.weight[: len(tiny_qwen.SPECIAL) + 1] = 0  # it answers in words
    model.save_pretrained(tmp_path / "checkpoint")
    export(Schedule.unpruned(), tmp_path / "checkpoint", tmp_path / "out", verify="none")
    images = [Image.effect_noise(size, 80).convert("RGB") for size in ((60, 31), (25, 70))]
    questions = ["what colour is the digit ?", "and how many are there ?"]
    conversation = Conversation(Artifact.load(tmp_path / "out", threads=1))
    answers = [
        conversation.ask(question, [image], max_new_tokens=6)
        for question, image in zip(questions, images, strict=True)
    ]
    processor = load_processor(tmp_path / "checkpoint", backend="pil")
    messages: list[dict[str, Any]] = []
    for question, image, answer in zip(questions, images, answers, strict=True):
        said = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        messages.append({"role": "user", "content": said})
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        model.model.rope_deltas = None
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        tokens = expected[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(answer.token_ids) == tokens[: len(answer.token_ids)]
        assert len(answer.token_ids) > 2
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer.text}]})


def test_a_search_sees_what_the_model_sees(tmp_path: Path) -> None:
    model = tiny_qwen.qwen3_vl(tmp_path / "checkpoint")
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for file, size in zip(files, ((70, 40), (33, 90)), strict=True):
        Image.effect_noise(size, 80).convert("RGB").save(file)
    asked = [
        Question((files[0],), "what colour is the digit ?", (), "here", "one"),
        Question((files[1], files[0]), "how many ?", (), "here", "two"),
    ]
    searched = TorchModel(tmp_path / "checkpoint", "cpu", "fp32")
    batch = searched.batch(asked)
    runs = searched.reference(Resolved(5, None, ()))
    places = batch.positions, batch.ahead
    inputs = searched.embed_tokens, batch.embeds, batch.mask, batch.vision
    said = runs.generate(*inputs, max_new_tokens=6, positions=places)
    expected = [answered(model, tmp_path / "checkpoint", question) for question in asked]
    assert said.tokens.tolist() == expected
    drafted = searched.batch(asked, expected)
    logits = searched.head(runs.finish(searched.hold(drafted)))
    assert logits.argmax(-1).tolist() == expected


def answered(model: Any, checkpoint: Path, question: Question) -> list[int]:
    """Six tokens of transformers' own answer."""
    processor = load_processor(checkpoint, backend="pil")
    content: list[Any] = [{"type": "image", "path": str(file)} for file in question.images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    model.model.rope_deltas = None
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    said = model.generate(**inputs, **options, eos_token_id=None)
    return list(said[0, inputs["input_ids"].shape[1] :].tolist())


def test_an_engine_takes_one_image_of_any_size_a_row() -> None:
    ports = {
        "pixel_values": ("tokens", 4, 1176),
        "frames": ("frames", "longest"),
        "frame_places": ("tokens", 4),
        "windows": ("windows", 64),
    }
    limits = {"max_batch": 2, "max_vision_tokens": 100, "max_text_tokens": 9, "max_new_tokens": 9}
    best = {"opt_batch": 1, "opt_vision_tokens": 50, "opt_text_tokens": 9, "opt_new_tokens": 9}
    bounds = vision_profile(ports, Ranges(**limits, **best), 100).inputs
    assert bounds["pixel_values"].most == (200, 4, 1176)
    assert bounds["frames"].best == (1, 200)
    assert bounds["frames"].most == (2, 400)
    assert bounds["windows"].best == (4, 64)
    assert bounds["windows"].most[0] == 200  # as narrow as one token each


@pytest.mark.parametrize("kind", FLAT)
def test_first_layers_of_a_flat_file_are_its_own(kind: str, tmp_path: Path) -> None:
    config = {"model_type": kind, **TOP, **FLAT[kind]}
    whole = Checkpoint(tmp_path, config, {}, (), {})
    short = read_facts(truncate(whole, 2, tmp_path).config, "x")
    assert replace(short, layers=3) == read_facts(config, "x")
    assert AutoConfig.from_pretrained(tmp_path).get_text_config().num_hidden_layers == 2
