"""FocusLLaVA with its router in the checkpoint: exported and verified whole, refused without."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import vision_cases
from command import vtr
from conftest import in_this_process
from safetensors.torch import load_file, save_file
from tiny_models import save_checkpoint, tiny_llava

from vtr_export import export
from vtr_export.checkpoint import Checkpoint
from vtr_export.compile import lower
from vtr_export.errors import AnalysisError, CheckpointError
from vtr_export.families import read_facts, tower_of
from vtr_export.reductions.focusllava import PARTS
from vtr_export.reference.load import with_held
from vtr_export.schedule import Schedule
from vtr_export.weights import write_weights

if TYPE_CHECKING:
    from conftest import Loader

SCHEDULE = Schedule.parse(
    "version: 1\n"
    "vision: [{method: focusllava}]\n"
    "prefill: {stages: [{before_layer: 1, keep: 50%}]}\n"
)


@pytest.fixture(scope="module", autouse=True)
def quick(one_trace: None) -> Iterator[None]:
    """One trace, and no process of its own for each verification."""
    with in_this_process():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA of 8 by 8 tokens and a router, in one file."""
    model = tiny_llava(layers=2, image=56, patch=7)
    facts = read_facts(model.config.to_dict(), "config.json")
    tower = tower_of(facts)
    assert tower is not None
    held = with_held(model, vision_cases.sampler(model, facts, tower))
    return save_checkpoint(held, tmp_path_factory.mktemp("trained"))


def changed(folder: Path, to: Path, **weights: Any) -> Path:
    """A copy of a checkpoint with some of its router's parts replaced, or left out (None)."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    found = load_file(to / "model.safetensors")
    for part, weight in weights.items():
        name = next(name for name in PARTS if name.endswith(part.replace("_", ".")))
        found.pop(name)
        found |= {} if weight is None else {name: weight}
    save_file(found, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("weights", ["copy", "link"])
def test_a_router_goes_from_checkpoint_to_artifact(
    trained: Path, tmp_path: Path, weights: str
) -> None:
    report = export(SCHEDULE, trained, tmp_path / "out", weights=weights, verify="all")
    assert report.verified
    assert report.scope == "all"
    assert "vision_encoder.cosine" in {gate.name for gate in report.gates}


@pytest.mark.parametrize(("scale", "tokens"), [(0, 4), (1, 16), (2, 64)])
def test_another_router_gives_another_encoder(
    trained: Path, traced_once: "Loader", tmp_path: Path, scale: int, tokens: int
) -> None:
    """Whichever scale its bias wants."""
    bias = np.full(3, -1e6, np.float32)
    bias[scale] = 0
    model = reduced(trained, traced_once, lambda held: {**held, PARTS[-1]: ir.tensor(bias)})
    write_weights({"vision_encoder": model}, tmp_path)
    ir.save(model, tmp_path / "vision_encoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "vision_encoder.onnx")
    pixels = np.random.default_rng(0).normal(size=(2, 3, 56, 56)).astype(np.float32)
    (counts,) = session.run(["image_counts"], {"pixel_values": pixels})
    assert counts.tolist() == [tokens, tokens]


def test_a_weight_that_nobody_gave_is_missed(trained: Path, traced_once: "Loader") -> None:
    with pytest.raises(AnalysisError, match=r"vision_sampler\.router\.0\.weight"):
        reduced(trained, traced_once, lambda _: {})


def reduced(folder: Path, load: "Loader", change: Any) -> ir.Model:
    """The vision encoder with some of the router's weights changed."""
    opened = Checkpoint.open(folder)
    facts = read_facts(opened.config, "config.json")
    graphs = load(opened, facts, "fp32", whole=True)
    changed = replace(graphs, held=change(graphs.held))
    return lower(changed, SCHEDULE.resolve(facts), weights="copy")["vision_encoder"]


@pytest.mark.parametrize(
    ("part", "weight", "found"),
    [
        ("0_weight", None, "is not there"),
        ("2_bias", None, "is not there"),
        ("0_weight", torch.zeros(4, 15), "has shape [4, 15]"),
    ],
)
def test_a_checkpoint_without_its_router_is_refused_before_anything_is_read(
    trained: Path, tmp_path: Path, part: str, weight: Any, found: str
) -> None:
    folder = changed(trained, tmp_path / "model", **{part: weight})
    (tmp_path / "s.yaml").write_text(SCHEDULE.dump(), encoding="utf-8")
    with pytest.raises(CheckpointError) as error:
        export(SCHEDULE, folder, tmp_path / "out", dry_run=True)
    said = str(error.value)
    assert found in said
    assert f"vision_sampler.router.{part.replace('_', '.')}" in said
    assert "vision[0]" in said
    asked = ("-s", tmp_path / "s.yaml", "-m", folder, "-o", tmp_path / "out")
    assert vtr("export", *asked).code == 2
    assert not (tmp_path / "out").exists()
