"""What holds of every family: its artifact says what transformers says of the same images.

Gates are measured of all of them; what else holds is tested of one of each kind, or of all with
VTR_EVERY_FAMILY=1 in the environment.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import TINY, stages
from transformers import AutoModelForImageTextToText

from vtr_export import Artifact, Schedule, export
from vtr_export.families import read_facts
from vtr_export.inner_decoder import point_at_layers
from vtr_export.memory import parameters
from vtr_export.runtime.artifact import Request
from vtr_export.runtime.sampling import Options
from vtr_export.runtime.session import Resident
from vtr_export.verify.processors import load_processor

QUESTION, OTHER, STEPS = "what colour is the digit ?", "how many are there", 16
SIZES = ((41, 50), (90, 33))  # of the images that are asked about
STAGES: dict[str, Any] = {
    "version": 1,
    "prefill": {
        "score": {"from": "previous", "query": "text", "heads": "mean"},
        "stages": [
            {"before_layer": 1, "keep": "75%"},
            {"before_layer": 2, "keep": "50%"},
            {"before_layer": 3, "keep": "25%"},
        ],
    },
}
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from vtr_export.cli import main
main()
"""


KINDS = (
    "gemma3", "idefics2", "internvl", "llava", "llava_next", "mistral3", "qwen2_5_vl", "qwen3_vl",
)  # fmt: skip
MOST = dict.fromkeys(("blip-2", "instructblip"), 1)  # images that a prompt may have
WHOLLY = tuple(TINY) if os.environ.get("VTR_EVERY_FAMILY") else KINDS


@dataclass(frozen=True)
class Family:
    """A checkpoint and what was exported of it."""

    checkpoint: Path
    pruned: Path  # three stages, every gate passed; its keeps are inputs
    unpruned: Path
    most: int = 2  # images in a prompt


@pytest.fixture(scope="module", params=WHOLLY)
def family(
    request: pytest.FixtureRequest,
    one_trace: None,
    checked_here: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Family:
    folder = tmp_path_factory.mktemp(request.param.replace("/", "-"))
    TINY[request.param](folder / "checkpoint", 0)
    folders = (folder / name for name in ("checkpoint", "pruned", "unpruned"))
    made = Family(*folders, MOST.get(request.param, 2))
    schedule = Schedule.from_data(stages(made.checkpoint))
    export(schedule, made.checkpoint, made.pruned, verify="all", tunable=True)
    export(Schedule.unpruned(), made.checkpoint, made.unpruned, verify="none")
    return made


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def pictures() -> list[Image.Image]:
    return [picture(seed, size) for seed, size in enumerate(SIZES)]


def test_every_gate_is_measured_and_passes(family: Family) -> None:
    check_gates(family.pruned)


@pytest.mark.parametrize("name", [name for name in TINY if name not in WHOLLY])
def test_every_gate_of_the_others_too(name: str, checked_here: None, tmp_path: Path) -> None:
    TINY[name](tmp_path / "checkpoint", 0)
    schedule = Schedule.from_data(stages(tmp_path / "checkpoint"))
    export(schedule, tmp_path / "checkpoint", tmp_path / "out", verify="all")
    check_gates(tmp_path / "out")


def check_gates(folder: Path) -> None:
    manifest = Artifact.load(folder).manifest
    assert manifest.verified
    assert manifest.scope == "all"
    names = {gate.name for gate in manifest.gates}
    assert {"pixel_values", "token_ids", "batch.differences", "keep_sets.ties"} <= names


@pytest.mark.parametrize("images", [0, 1, 2])
def test_unpruned_it_answers_as_transformers_does(family: Family, images: int) -> None:
    if images > family.most:
        pytest.skip("its prompts have one image, which transformers' processor does not check")
    given = pictures()[:images]
    expected = generated(family.checkpoint, QUESTION, given)
    answer = Artifact.load(family.unpruned, threads=1).generate(
        given, QUESTION, max_new_tokens=STEPS
    )
    assert list(answer.token_ids) == expected


def generated(checkpoint: Path, question: str, images: Sequence[Image.Image]) -> list[int]:
    """The tokens of transformers' own answer, without the one that ended it."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor = load_processor(checkpoint, backend="pil")
    inputs = asked(processor, question, images)
    with torch.no_grad():
        said = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    tokens = said[0, inputs["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:last])


def asked(processor: Any, question: str, images: Sequence[Image.Image]) -> Any:
    """What transformers' model is given."""
    is_plain, one_by_one = processor.chat_template is None, hasattr(processor, "multi_page")
    if not images and (is_plain or one_by_one):
        pytest.skip("transformers' processor, or generate, takes no prompt without an image")
    if is_plain:
        return processor(text=[question], images=[list(images)], return_tensors="pt")
    content: list[Any] = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    if one_by_one:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return processor(text=[text], images=list(images), return_tensors="pt")
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def test_unlike_rows_of_a_batch_are_answered_as_alone(family: Family) -> None:
    first, second = pictures()
    requests = [
        Request(QUESTION, [first]),
        Request(OTHER, [second, first][: family.most]),
        Request(OTHER, ()),
    ]
    for folder in (family.pruned, family.unpruned):
        artifact = Artifact.load(folder, threads=1)
        together = artifact.generate_batch(requests, Options(STEPS))
        alone = [artifact.generate(r.images, r.prompt, max_new_tokens=STEPS) for r in requests]
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
        for one, other in zip(together, alone, strict=True):
            assert [kept.tolist() for kept in one.kept] == [kept.tolist() for kept in other.kept]


def test_cuts_that_keep_everything_change_no_bit(family: Family) -> None:
    pruned = Artifact.load(family.pruned).manifest
    everything = [s.keep.denominator for s in pruned.model.stages if s.keep is not None]
    images = pictures()[-family.most :]
    whole, unpruned = played(family.pruned, images, everything), played(family.unpruned, images)
    assert len(whole) == len(unpruned) == STEPS
    for step, (one, other) in enumerate(zip(whole, unpruned, strict=True)):
        for name, values in other.items():
            assert np.array_equal(one[name], values), f"{name} of call {step}"


def played(
    folder: Path, images: Sequence[Image.Image], keep: list[int] | None = None
) -> list[Mapping[str, np.ndarray]]:
    """Logits and cache of a prefill and its decode steps, token 7 fed again and again."""
    artifact = Artifact.load(folder, threads=1, keep=keep)
    prepared = artifact.prepare([Request(QUESTION, images)])
    assert prepared.images is not None
    model = artifact.model
    features = model.encode(prepared.images.feeds).features
    batch = model.pad([row.ids for row in prepared.rows])
    step = model.prefill(model.decoder.empty(1), batch, features, prepared.seen)
    steps = [step]
    for _ in range(STEPS - 1):
        steps.append(model.extend(steps[-1].cache, np.array([7])))
    return [
        {"logits": each.logits}
        | {
            name: value.value.numpy() if isinstance(value, Resident) else np.asarray(value)
            for name, value in each.cache.values.items()
            if not name.startswith("past_mask.")
        }
        for each in steps
    ]


def test_it_runs_from_a_file_without_torch(family: Family, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    pictures()[1].save(image)
    command = [sys.executable, "-c", WITHOUT_TORCH, "run", family.pruned, "--image", image,
               "--prompt", QUESTION, "--max-new-tokens", str(STEPS), "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = Artifact.load(family.pruned).generate([image], QUESTION, max_new_tokens=STEPS)
    assert json.loads(done.stdout.splitlines()[-1])["answer"] == answer.text


def test_the_facts_count_its_parameters(family: Family) -> None:
    facts = read_facts(json.loads((family.checkpoint / "config.json").read_text()), "config.json")
    model = AutoModelForImageTextToText.from_pretrained(family.checkpoint)
    point_at_layers(model)
    assert len(model.get_decoder().layers) == facts.layers
    held = parameters(facts)
    decoder = sum(p.numel() for p in model.get_decoder().parameters())
    assert (
        held.embedding
        + held.final_norm
        + held.crosses
        + held.layers * (held.layer_linear + held.layer_other)
        == decoder
    )
    assert held.total <= sum(p.numel() for p in model.parameters())  # a tower's last layers may go
