"""The digits sample: its scenes, its files and its training."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from vtr_export.exporter import export

pytest.importorskip("sklearn", reason="scenes are made of scikit-learn's digits")
pytest.importorskip("transformers", reason="the sample is a transformers checkpoint")

SAMPLE = Path(__file__).parents[1] / "samples" / "digits"
LINES = (SAMPLE / "questions.jsonl").read_text(encoding="utf-8").splitlines()
ROWS = [json.loads(line) for line in LINES]


@pytest.fixture(scope="module")
def scenes() -> ModuleType:
    sys.path.insert(0, str(SAMPLE))
    try:
        return importlib.import_module("scenes")
    finally:
        sys.path.remove(str(SAMPLE))


def test_scenes_are_a_function_of_their_arguments(scenes: ModuleType) -> None:
    first, again = (scenes.make("held_out", 5, 3, 4) for _ in range(2))
    other = scenes.make("held_out", 5, 4, 4)
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.cells, again.cells)
    assert not np.array_equal(first.images, other.images)


def test_no_held_out_digit_is_trained_on(scenes: ModuleType) -> None:
    trained, held_out = (scenes.glyphs(split)[0] for split in ("train", "held_out"))
    assert len(trained) + len(held_out) == 1797
    seen = {image.tobytes() for image in trained}
    assert not [image for image in held_out if image.tobytes() in seen]


def test_every_shipped_question_has_its_image() -> None:
    images = {path.relative_to(SAMPLE).as_posix() for path in SAMPLE.glob("images/*.png")}
    assert {row["image"] for row in ROWS} == images
    assert len(images) == 64
    assert all(row["question"] and row["answers"] for row in ROWS)


def test_the_processor_loads_offline_and_expands_the_image(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from PIL import Image
    from transformers import AutoProcessor, LlavaProcessor

    processor = AutoProcessor.from_pretrained(SAMPLE / "model")
    assert isinstance(processor, LlavaProcessor)
    content = [{"type": "image"}, {"type": "text", "text": ROWS[0]["question"]}]
    turns = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    with Image.open(SAMPLE / ROWS[0]["image"]) as image:
        inputs = processor(images=image, text=prompt, return_tensors="np")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == 144
    assert processor.tokenizer.unk_token_id not in ids


def test_twenty_steps_of_training_leave_a_checkpoint_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "model"
    sizes = ["--steps", "20", "--batch", "4"]
    command = [sys.executable, str(SAMPLE / "train.py"), "--out", str(out), *sizes]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, notes = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert model.config.text_config.num_hidden_layers >= 8
    AutoProcessor.from_pretrained(out)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "artifact"
    export(SAMPLE / "gsearch.yaml", SAMPLE / "model", out, verify="none")
    return out


def test_the_pruned_sample_answers_as_the_pruned_reference(artifact: Path) -> None:
    command = [sys.executable, str(SAMPLE / "agree.py"), str(artifact), "--more", "512"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "640 questions, 640 answered alike" in done.stdout
    assert float(done.stdout.split()[-1].rstrip("%")) > 95
