"""What is particular to InternVL: tiles, OpenGVLab's own layout, and what of it is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny_internvl
import tiny_internvl_chat
import torch
from PIL import Image
from test_family_contract import STAGES
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from vtr_export import Artifact, Schedule, export
from vtr_export.assemble import copy_assets
from vtr_export.checkpoint import Checkpoint, read_model_facts
from vtr_export.errors import CheckpointError
from vtr_export.families import read_facts
from vtr_export.frontends.tokenizer import write_tokenizer
from vtr_export.memory import Workload, get_weight_type, parameters, peak_bytes
from vtr_export.reference.internvl_chat import shuffled
from vtr_export.runtime.images import read_kind
from vtr_export.runtime.images.kinds import parse_kind
from vtr_export.runtime.processor import Processor
from vtr_export.weights import CheckpointTensor, link_weights

TILE = tiny_internvl.IMAGE
FIRST = {  # InternVL 1.1
    "pad2square": True, "dynamic_image_size": False, "use_thumbnail": False, "ps_version": "v1",
    "select_layer": -4,
}  # fmt: skip
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "options",
    [
        {"norm_type": "rms_norm", "use_qk_norm": True, "text": "llama"},
        {"attention_bias": True, "text": "qwen3"},
        {"use_mean_pooling": False},
        {"use_absolute_position_embeddings": False},
        {"tied": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_facts_count_every_parameter(options: dict[str, Any]) -> None:
    model = tiny_internvl.tiny_internvl(**options)
    config = model.config.to_dict()
    assert parameters(read_facts(config, "config.json")).total == sum(
        parameter.numel() for parameter in model.parameters()
    )


def test_memory_counts_every_tile() -> None:
    facts = read_facts(tiny_internvl.tiny_internvl().config.to_dict(), "config.json")
    one, five = (
        peak_bytes(
            facts,
            Schedule.unpruned().resolve(facts),
            Workload(vision_tokens=tiles * tiny_internvl.TOKENS, text_tokens=8),
            get_weight_type("fp16"),
            fused=True,
        ).vision
        for tiles in (1, 5)
    )
    assert five == 5 * one


def test_the_grid_is_that_of_transformers() -> None:
    for least, most in ((1, 12), (1, 6), (3, 7), (2, 40)):
        facts = {"size": TILE, "crop_to_patches": True, "min_patches": least, "max_patches": most}
        kind: Any = parse_kind({"image_processor_type": "GotOcr2ImageProcessor", **facts}, "x")
        for width in range(1, 200, 7):
            for height in range(1, 200, 9):
                expected = get_optimal_tiled_canvas((height, width), (TILE, TILE), least, most)
                assert kind.grid(width, height) == expected


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("internlm2")
    tiny_internvl_chat.internlm2(folder)
    return folder


def test_fused_projections_are_taken_apart_by_their_definition(internlm2: Path) -> None:
    tensors = Checkpoint.open(internlm2).tensors
    fused = loaded_whole(internlm2)
    layer = "model.language_model.layers.1.self_attn"
    query, key, value = (read(tensors[f"{layer}.{n}_proj.weight"]) for n in "qkv")
    rows = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    states = rows @ fused["language_model.model.layers.1.attention.wqkv.weight"].T
    states = states.view(7, 2, 4, 8)  # kv heads; two queries, a key and a value; head_dim
    assert torch.equal(states[:, :, :2].reshape(7, -1), rows @ query.T)
    assert torch.equal(states[:, :, -2].reshape(7, -1), rows @ key.T)
    assert torch.equal(states[:, :, -1].reshape(7, -1), rows @ value.T)
    thirds = fused["vision_model.encoder.layers.2.attn.qkv.weight"].view(3, 16, 16)
    for number, letter in enumerate("qkv"):
        name = f"model.vision_tower.encoder.layer.2.attention.{letter}_proj.weight"
        assert torch.equal(thirds[number], read(tensors[name]))


def loaded_whole(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def read(ref: Any) -> torch.Tensor:
    return torch.from_numpy(CheckpointTensor(ref, name="w", dtype=ir.DataType.FLOAT).numpy())


def test_v1_leaves_rows_and_columns_exchanged() -> None:
    features = torch.arange(2 * 4 * 4 * 3.0).view(2, 4, 4, 3)
    merged = features.view(2, 2, 2, 2, 2, 3).transpose(2, 3).reshape(2, 2, 2, 12)  # row by row
    for version, expected in (("v2", merged), ("v1", merged.transpose(1, 2))):
        model = shuffled(tiny_internvl.tiny_internvl(), version)
        assert torch.equal(model.model.pixel_shuffle(features, scale_factor=0.5), expected)


@pytest.mark.parametrize(
    ("save", "changes"),
    [
        (tiny_internvl_chat.internlm2, {}),
        (tiny_internvl_chat.qwen2, {"ps_version": "v1", "select_layer": -2}),
        (tiny_internvl_chat.llama, FIRST),
    ],
    ids=["internlm2", "qwen2-v1", "1.1"],
)
def test_their_own_layout_passes_every_gate(
    save: Any, changes: dict[str, Any], checked_here: None, tmp_path: Path
) -> None:
    save(tmp_path / "model", **changes)
    report = export(
        Schedule.from_data(STAGES), tmp_path / "model", tmp_path / "artifact", verify="all"
    )
    assert report.warnings == ()
    names = {gate.name for gate in report.gates}
    assert {"pixel_values", "token_ids", "vision_encoder.cosine"} <= names
    image = tmp_path / "image.png"
    noise(90, 40).save(image)
    artifact = Artifact.load(tmp_path / "artifact", threads=1)
    assert artifact.generate([image], "what colour ?", max_new_tokens=4).token_ids


def test_images_are_prepared_as_their_code_does(internlm2: Path, tmp_path: Path) -> None:
    processor = processor_of(internlm2, tmp_path)
    facts = read_model_facts(internlm2)
    for size in ((28, 28), (90, 33), (33, 90), (500, 20), (3, 5), (61, 59)):
        image = noise(*size)
        pixels = processor.images.inputs([image], facts).feeds["pixel_values"]
        assert np.array_equal(pixels, published(image, most=6)), size


def published(image: Image.Image, most: int) -> np.ndarray:
    """``load_image`` of OpenGVLab's model cards, in numpy."""
    ratio, nearest, best = image.width / image.height, float("inf"), (1, 1)
    grids = {(i, j) for n in range(1, most + 1) for i in range(1, n + 1)
             for j in range(1, n + 1) if i * j <= most}  # fmt: skip
    for i, j in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(ratio - i / j)
        larger = image.width * image.height > 0.5 * TILE * TILE * i * j
        if distance < nearest or (distance == nearest and larger):
            nearest, best = distance, (i, j)
    whole = image.resize((TILE * best[0], TILE * best[1]), Image.Resampling.BICUBIC)
    tiles = [
        whole.crop((TILE * x, TILE * y, TILE * (x + 1), TILE * (y + 1)))
        for y in range(best[1])
        for x in range(best[0])
    ]
    if len(tiles) > 1:
        tiles.append(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    values = np.stack([np.asarray(tile) for tile in tiles]).astype(np.float32) / np.float32(255)
    scaled = (values - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return scaled.transpose(0, 3, 1, 2)


def test_one_size_is_one_tile_without_a_thumbnail(tmp_path: Path) -> None:
    tiny_internvl_chat.internlm2(tmp_path / "model", dynamic_image_size=False, use_thumbnail=False)
    processor = processor_of(tmp_path / "model", tmp_path)
    inputs = processor.image_inputs([noise(500, 20)])
    assert inputs.feeds["pixel_values"].shape == (1, 3, TILE, TILE)
    assert inputs.tokens == tiny_internvl.TOKENS


def test_an_image_is_padded_to_a_square_where_they_pad_it(tmp_path: Path) -> None:
    tiny_internvl_chat.llama(tmp_path / "model", **FIRST)
    processor = processor_of(tmp_path / "model", tmp_path)
    for size in ((28, 28), (90, 33), (33, 90), (500, 20), (3, 5), (61, 60)):
        image = noise(*size)
        square = Image.new("RGB", (max(size), max(size)), tuple(int(x * 255) for x in MEAN))
        square.paste(image, tuple((max(size) - edge) // 2 for edge in size))
        pixels = processor.image_inputs([image]).feeds["pixel_values"]
        assert np.array_equal(pixels, published(square, most=1)), size


def test_tiles_are_squares_already(tmp_path: Path) -> None:
    tiny_internvl_chat.internlm2(tmp_path / "model", pad2square=True)
    processor = processor_of(tmp_path / "model", tmp_path)
    pixels = processor.image_inputs([noise(90, 33)]).feeds["pixel_values"]
    assert np.array_equal(pixels, published(noise(90, 33), most=6))


def test_the_prompt_is_what_their_conversation_writes(internlm2: Path, tmp_path: Path) -> None:
    processor = processor_of(internlm2, tmp_path)
    text = processor.render(processor.messages("what colour ?", 1))
    question = "<IMG_CONTEXT>\nwhat colour ?"
    assert text == f"bottom yes</s>user {question}</s>assistant "
    own = [{"role": "system", "content": "no"}, *processor.messages("is it ?", 0)]
    answered = [*own, {"role": "assistant", "content": "two"}]
    assert processor.render(answered) == "bottom no</s>user is it ?</s>assistant two</s>assistant "


def processor_of(checkpoint: Path, folder: Path) -> Processor:
    """Of the files that an artifact of ``checkpoint`` gets."""
    copy_assets(Checkpoint.open(checkpoint), folder)
    return Processor(folder)


def test_a_vocabulary_and_its_merges_become_a_tokenizer(internlm2: Path, tmp_path: Path) -> None:
    model, artifact = tmp_path / "model", tmp_path / "artifact"
    shutil.copytree(internlm2, model)
    (model / "tokenizer.json").unlink()
    letters = {letter: number for number, letter in enumerate(bytes_to_unicode().values())}
    (model / "vocab.json").write_text(json.dumps({**letters, "wh": 256, "at": 257, "what": 258}))
    (model / "merges.txt").write_text("#version: 0.2\nw h\na t\nwh at\n")
    added = {"<img>": 259, "<IMG_CONTEXT>": 260, "</img>": 261, "<|endoftext|>": 262}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(number): {"content": token, "special": True} for token, number in added.items()
        },
    }
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    artifact.mkdir()
    (model / "merges.txt").rename(model / "lost")
    assert any(
        "tokenizer.json" in said
        for said in copy_assets(Checkpoint.open(model), artifact, write_tokenizer)
    )
    (model / "lost").rename(model / "merges.txt")
    assert copy_assets(Checkpoint.open(model), artifact, write_tokenizer) == []
    text = "what is <img><IMG_CONTEXT></img>\n it?"
    assert (
        Processor(artifact).tokenizer.encode(text)
        == Qwen2Tokenizer.from_pretrained(model)(text)["input_ids"]
    )


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"use_llm_lora": 16}, "use_llm_lora"),
        ({"image_fold": 2}, "image_fold"),
        ({"force_image_size": 56}, "force_image_size"),
        ({"ps_version": "v3"}, "v3"),
        ({"select_layer": 9}, "select_layer"),
        ({"use_thumbnail": False}, "use_thumbnail"),
        ({"llm_config": {"architectures": ["Phi3ForCausalLM"]}}, "Phi3ForCausalLM"),
        ({"llm_config": None}, "llm_config"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_would_be_left_out_is_refused(
    changes: dict[str, Any], what: str, internlm2: Path, tmp_path: Path
) -> None:
    config = json.loads((internlm2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=what):
        read_model_facts(tmp_path)


def test_without_a_tokenizer_the_image_token_is_not_guessed(
    internlm2: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((internlm2 / "config.json").read_text())
    with pytest.raises(CheckpointError, match="IMG_CONTEXT"):
        read_model_facts(tmp_path)


def test_parts_of_a_fused_tensor_are_not_linked(internlm2: Path) -> None:
    ref = Checkpoint.open(internlm2).tensors[
        "model.language_model.layers.0.self_attn.k_proj.weight"
    ]
    lazy = CheckpointTensor(ref, name="k", dtype=ir.DataType.FLOAT)
    weight = ir.Value(name="k", const_value=lazy)
    graph = ir.Graph([], [], nodes=[], initializers=[weight], opset_imports={"": 24})
    with pytest.raises(CheckpointError, match="pieces"):
        link_weights({"decoder": ir.Model(graph, ir_version=11)}, internlm2)


def test_a_processor_asks_for_tiles_whatever_its_file_says(tmp_path: Path) -> None:
    tiny_internvl.tiny_processor(tiny_internvl.tiny_internvl()).save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    assert json.loads(file.read_text())["image_processor"]["crop_to_patches"] is False
    kind: Any = read_kind(tmp_path)
    assert kind.most == 6
