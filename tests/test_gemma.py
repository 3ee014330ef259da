"""What is particular to Gemma 3 and PaliGemma: who sees whom, capped logits, windows, prompts."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gemma
import tiny_models
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from vtr_export import Schedule, doctor
from vtr_export.builder import build
from vtr_export.embeddings import write_table
from vtr_export.errors import ArtifactError, EngineError, ScheduleError, UnavailableError
from vtr_export.exporter import Report, export
from vtr_export.families import read_facts
from vtr_export.manifest import Manifest
from vtr_export.memory import parameters
from vtr_export.plan import plan
from vtr_export.reference import Head, groups_for
from vtr_export.runtime.batch import pad_batch, token_groups
from vtr_export.runtime.images.kinds import parse_kind
from vtr_export.runtime.processor import Processor
from vtr_export.runtime.session import check_version
from vtr_export.verify.processors import load_image_processor

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))
CUT = "version: 1\nprefill: {stages: [{before_layer: 1, keep: 3}]}\n"
KINDS = ("gemma3", "paligemma", "paligemma2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    room = tmp_path_factory.mktemp("gemma")
    for kind in KINDS:
        getattr(tiny_gemma, kind)(room / kind)
    return {kind: room / kind for kind in KINDS}


def model_of(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_those_of_the_models_own_mask(folders: dict[str, Path], kind: str) -> None:
    facts = read_facts(json.loads((folders[kind] / "config.json").read_text()), kind)
    image, word = facts.image_token_id, 14
    rows = [[word, image, image, word, image, image, image, word], [word, word, image, word]]
    batch = pad_batch(rows, 0, image)
    ours = token_groups(batch, image, facts.attends)
    ids, mask = torch.tensor(batch.input_ids), torch.tensor(batch.attention_mask)
    theirs = groups_for(model_of(folders[kind]), ids, mask).numpy()
    if kind == "gemma3":  # an image of one token has nobody else to see
        ours[1] = 0
    assert (ours == theirs).all()
    assert len(np.unique(ours)) == (3 if kind == "gemma3" else 2)


def test_a_causal_model_has_no_groups() -> None:
    model, ids = tiny_models.tiny_llava(), torch.tensor([[5, 4, 4, 6]])
    assert not groups_for(model, ids, torch.ones_like(ids)).any()


def test_layers_that_see_unlike_tokens_have_no_groups(folders: dict[str, Path]) -> None:
    model, ids = model_of(folders["gemma3"]), torch.full((1, 9), 14)
    model.config.text_config.sliding_window = 4
    with pytest.raises(ValueError, match=r"not causal but for|unlike"):
        groups_for(model, ids, torch.ones_like(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_what_the_model_makes_of_its_decoder(folders: dict[str, Path], kind: str) -> None:
    model = model_of(folders[kind])
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, said = model.lm_head(hidden), Head(model)(hidden)
    cap = 5.0 if kind == "paligemma2" else None
    torch.testing.assert_close(said, plain if cap is None else cap * torch.tanh(plain / cap))


@pytest.mark.parametrize("kind", KINDS)
def test_facts_count_the_whole_model(folders: dict[str, Path], kind: str) -> None:
    facts = read_facts(json.loads((folders[kind] / "config.json").read_text()), kind)
    held = sum(weight.numel() for weight in model_of(folders[kind]).parameters())
    assert parameters(facts).total == held


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gemma3", "vision_config": {"image_size": 896, "patch_size": 14}},
        {"model_type": "paligemma"},
        {
            "model_type": "paligemma",
            "text_config": {"model_type": "gemma2", "hidden_size": 2048},
        },
    ],
)
def test_facts_of_a_silent_file_are_those_of_its_class(config: dict[str, Any]) -> None:
    facts, whole = read_facts(config, "x"), AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(whole)
    decoder = sum(weight.numel() for weight in model.get_decoder().parameters())
    held = parameters(facts)
    assert (
        held.embedding + held.final_norm + held.layers * (held.layer_linear + held.layer_other)
        == decoder
    )


def test_pan_and_scan_is_what_the_whole_processor_asks(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Gemma3Processor leaves it out whatever the file says; alone, the file is refused."""
    folder = shutil.copytree(folders["gemma3"], tmp_path / "model")
    file = folder / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"] |= {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16,
                                  "pan_and_scan_max_num_crops": 4,
                                  "pan_and_scan_min_ratio_to_activate": 1.2}  # fmt: skip
    file.write_text(json.dumps(config))
    theirs = load_image_processor(folder)(images=PICTURE, return_tensors="np")["pixel_values"]
    ours = Processor(folder).image_inputs([PICTURE]).given["pixel_values"]
    assert np.array_equal(ours, theirs)
    with pytest.raises(ArtifactError, match="do_pan_and_scan"):
        parse_kind(config["image_processor"], "x")


@pytest.mark.parametrize("prompt", ["what colour", "<image>what colour", "what <image> colour"])
def test_paligemma_writes_a_prompt_as_its_processor(folders: dict[str, Path], prompt: str) -> None:
    from vtr_export.verify.processors import load_processor

    ours = Processor(folders["paligemma"])
    seen = ours.image_inputs([PICTURE]).seen
    theirs = load_processor(folders["paligemma"])(text=[prompt], images=[[PICTURE]])
    assert ours.token_ids(prompt, seen) == list(theirs["input_ids"][0])


def test_a_window_is_said_before_anything_is_exported(folders: dict[str, Path]) -> None:
    said = doctor.foresee(folders["gemma3"]).remarks
    assert any(f"{tiny_gemma.WINDOW} tokens back" in remark for remark in said)
    assert not any("tokens back" in r for r in doctor.foresee(folders["paligemma"]).remarks)


@pytest.fixture(scope="module")
def capped(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("capped") / "out"
    return out, export(Schedule.unpruned(), folders["paligemma2"], out, verify="none")


def test_an_engines_table_holds_embeddings_as_they_are_scaled(
    folders: dict[str, Path], capped: tuple[Path, Report], tmp_path: Path
) -> None:
    write_table(capped[0] / "onnx" / "embed_tokens.onnx", tmp_path / "table.npy", "fp32", {})
    with torch.no_grad():
        expected = model_of(folders["paligemma2"]).get_input_embeddings()(torch.arange(64))
    assert np.array_equal(np.load(tmp_path / "table.npy"), expected.numpy())


def test_a_softcap_asks_for_a_runtime_that_bends_before_it_masks(
    capped: tuple[Path, Report],
) -> None:
    out, report = capped
    manifest = Manifest.load(out)
    assert manifest.versions.runtimes["onnxruntime"] == ">=1.27"
    assert manifest.model.context == tiny_gemma.WINDOW
    assert any("tokens back" in warning for warning in report.warnings)
    check_version(">=1.27", "cpu")
    with pytest.raises(UnavailableError, match="needs onnxruntime >=99"):
        check_version(">=99.1", "cpu")


def test_norms_behind_attention_are_known_to_need_the_plugin(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """TensorRT-RTX fails on a cut ahead of them, and builds with the cut as one layer of ours."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'vtr-export[rtx]'")
    facts = read_facts(json.loads((folders["gemma3"] / "config.json").read_text()), "gemma3")
    cuts = Schedule.parse(CUT)
    for target, limits in (("tensorrt-rtx", 1), ("onnxruntime", 0)):
        assert len(plan(cuts, facts, target=target).limits) == limits
    assert plan(Schedule.unpruned(), facts, target="tensorrt-rtx", plugin="off").limits == ()
    with pytest.raises(ScheduleError, match="norm what attention") as refused:
        plan(cuts, facts, target="tensorrt-rtx", plugin="off")
    assert "--plugin auto" in refused.value.hint
    out = tmp_path / "out"
    export(cuts, folders["gemma3"], out, dtype="fp16", verify="none")
    built = build(out, sms=(86,), unverified=True)
    assert [engine["plugin_layers"] for engine in built.engines] == [0, 1]
    with pytest.raises(EngineError, match="norm what attention"):
        build(out, tmp_path / "x", sms=(86,), plugin="off", unverified=True)
