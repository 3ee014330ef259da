"""Checkpoints that bring their own code: refused unasked; asked, it runs and the manifest says so."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import vtr
from PIL import Image
from safetensors.torch import save_file
from tiny_models import save_checkpoint, tiny_llava
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vtr_export import Artifact
from vtr_export.checkpoint import Checkpoint, read_model_facts
from vtr_export.errors import CheckpointError
from vtr_export.families import read_facts
from vtr_export.frontends.remote import run_config

SCALE = 3.0
CODE = {
    "configuration_sparrow.py": """
import os
from pathlib import Path
from transformers import LlavaConfig

Path(os.environ["SPARROW_RAN"]).touch()


class SparrowConfig(LlavaConfig):
    model_type = "sparrow_vl"
""",
    "modeling_sparrow.py": """
from transformers import LlavaForConditionalGeneration
from .configuration_sparrow import SparrowConfig
from .loudness import SCALE


class SparrowForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = SparrowConfig
    config: SparrowConfig

    def forward(self, *args, **kwargs):
        said = super().forward(*args, **kwargs)
        said.logits = said.logits * SCALE
        return said
""",
    "loudness.py": f"SCALE = {SCALE}\n",
}
AUTO_MAP = {
    "AutoConfig": "configuration_sparrow.SparrowConfig",
    "AutoModelForImageTextToText": "modeling_sparrow.SparrowForConditionalGeneration",
}
SCHEDULE = """
version: 1
prefill: {score: {query: text}, stages: [{before_layer: 1, keep: 50%}, {before_layer: 3, keep: 25%}]}
"""
QUESTION, STEPS = "what colour is the digit ?", 8


@pytest.fixture(scope="module")
def llava() -> LlavaForConditionalGeneration:
    return tiny_llava()


@pytest.fixture(scope="module")
def sparrow(llava: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(llava, tmp_path_factory.mktemp("sparrow") / "checkpoint")
    state = {name: tensor.contiguous() for name, tensor in llava.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    rewrite(folder, model_type="sparrow_vl", auto_map=AUTO_MAP)
    for name, text in CODE.items():
        (folder / name).write_text(text)
    (folder.parent / "schedule.yaml").write_text(SCHEDULE)
    return folder


def rewrite(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def child(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``vtr`` in a process whose cache of foreign modules is empty."""
    home = {"HF_HOME": str(folder / "home"), "SPARROW_RAN": str(folder / "ran")}
    command = [sys.executable, "-c", "from vtr_export.cli import main; main()"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def exported(sparrow: Path) -> Path:
    """Verified, after its own code was asked for; its keeps are inputs."""
    schedule, out = sparrow.parent / "schedule.yaml", sparrow.parent / "artifact"
    asked = "export", "-s", schedule, "-m", sparrow, "-o", out, "--verify", "all", "--tunable"
    done = child(sparrow.parent, *asked, "--trust-remote-code")
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("command", ["export", "plan", "doctor"])
def test_unasked_it_is_refused_before_anything_of_it_is_imported(
    command: str, sparrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "export": ("-s", sparrow.parent / "schedule.yaml", "-o", tmp_path / "out", "--dry-run"),
        "plan": ("-s", sparrow.parent / "schedule.yaml"),
        "doctor": (),
    }[command]
    monkeypatch.setenv("SPARROW_RAN", str(tmp_path / "ran"))
    done = vtr(command, "-m", sparrow, *options)
    assert done.code == 2
    for said in ("modeling_sparrow.py", str(sparrow / "config.json"), "--trust-remote-code"):
        assert said in done.err
    assert not (tmp_path / "ran").exists()


def test_asked_it_runs_and_the_manifest_names_every_file(exported: Path, sparrow: Path) -> None:
    assert (sparrow.parent / "ran").exists()
    manifest = Artifact.load(exported).manifest
    assert manifest.verified
    assert {"forced.decode.difference", "pixel_values"} <= {gate.name for gate in manifest.gates}
    expected = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in CODE.items()}
    assert manifest.source.remote_code == expected


def test_an_artifact_of_transformers_own_code_names_none(
    exported: Path, sparrow: Path, tmp_path: Path
) -> None:
    assert not Checkpoint.open(save_checkpoint(tiny_llava(layers=2), tmp_path / "plain")).code
    assert vtr("verify", exported, "--model", sparrow).code == 2  # which is asked for again


def test_the_graphs_are_of_the_foreign_code(
    exported: Path, llava: LlavaForConditionalGeneration
) -> None:
    images = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8))
        for seed in range(2)
    ]
    everything = [s.keep.denominator for s in Artifact.load(exported).manifest.model.stages[1:]]
    artifact = Artifact.load(exported, threads=1, keep=everything)
    processor = LlavaProcessor.from_pretrained(exported.parent / "checkpoint", backend="pil")
    content = [*({"type": "image", "image": each} for each in images)]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = llava(**inputs).logits[:, -1]
        said = llava.generate(**inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    tokens = said[0, inputs["input_ids"].shape[1] :].tolist()
    answer = artifact.generate(images, QUESTION, max_new_tokens=STEPS)
    assert list(answer.token_ids) == tokens[: len(answer.token_ids)]
    model = artifact.model
    batch = model.pad([inputs["input_ids"][0].tolist()])
    features = model.encode({"pixel_values": inputs["pixel_values"].numpy()}).features
    step = model.prefill(model.decoder.empty(1), batch, features)
    np.testing.assert_allclose(step.logits, SCALE * logits.numpy(), atol=2e-4)


def test_a_folder_cannot_say_itself_that_its_code_was_run(sparrow: Path, tmp_path: Path) -> None:
    folder = copied(sparrow, tmp_path)
    rewrite(folder, remote_code={"modeling_sparrow.py": "0" * 64})
    with pytest.raises(CheckpointError, match="modelling code of its own"):
        read_model_facts(folder)
    assert not Checkpoint.open(folder).code


def copied(folder: Path, tmp_path: Path) -> Path:
    """The small files of a checkpoint, and its weights by a link."""
    (tmp_path / "copy").mkdir()
    for file in folder.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"auto_map": {**AUTO_MAP, "AutoConfig": "some/where--configuration.X"}}, "another"),
        ({"auto_map": {"AutoConfig": AUTO_MAP["AutoConfig"]}}, "names no model"),
        ({"auto_map": {**AUTO_MAP, "AutoConfig": "configuration_lost.X"}}, "fails"),
    ],
)
def test_code_that_cannot_be_run_is_said_so(
    changes: dict[str, object],
    reason: str,
    sparrow: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPARROW_RAN", str(tmp_path / "ran"))
    folder = copied(sparrow, tmp_path)
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError, match=reason):
        run_config(folder, trusted=True)
    assert run_config(folder, trusted=False) is None


def test_a_known_model_says_how_transformers_own_code_is_taken(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    with pytest.raises(CheckpointError) as refused:
        read_facts(config | {"auto_map": AUTO_MAP}, "config.json")
    assert "transformers' own llava" in refused.value.hint
    processing = {"AutoProcessor": "processing_sparrow.SparrowProcessor"}
    assert read_facts(config | {"auto_map": processing}, "config.json") == read_facts(config, "")
