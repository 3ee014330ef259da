"""A stranger's method: a package beside ours, found by its entry points, exported and verified."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

TOY = Path(__file__).parent / "toy_reduction"
VTR = ("-c", "from vtr_export.cli import main; main()")


def install(site: Path, **changed: dict[str, str]) -> Path:
    """As pip would: the package, and what its pyproject says; a group of entry points changed."""
    shutil.copytree(TOY / "toy_reduction", site / "toy_reduction")
    project = tomllib.loads((TOY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    said = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    said.mkdir()
    about = ("Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}")
    (said / "METADATA").write_text("\n".join(about) + "\n", encoding="utf-8")
    groups = project["entry-points"]
    groups = {name: changed.get(name.rpartition(".")[2], points) for name, points in groups.items()}
    lines = [
        line
        for name, points in groups.items()
        for line in (f"[{name}]", *(f"{key} = {value}" for key, value in points.items()))
    ]
    (said / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return site


def run(site: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """A process that finds the package, as any does where it is installed."""
    before = os.environ.get("PYTHONPATH")
    places = os.pathsep.join([str(site), *([before] if before else [])])
    env = os.environ | {"PYTHONPATH": places, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def features(artifact: Path, pixels: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(
        str(artifact / "onnx" / "vision_encoder.onnx"), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"pixel_values": pixels}), strict=True))


def defined(checkpoint: Path, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By transformers alone: projected tokens [I,K,D] of the longest features, and which."""
    import torch
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        given = torch.from_numpy(pixels)
        tower = model.model.vision_tower(given, output_hidden_states=True)
        seen = tower.hidden_states[model.config.vision_feature_layer][:, 1:]
        tokens = seen.shape[1]
        kept = seen.norm(dim=-1).topk(tokens // 4).indices.sort().values
        rows = seen.gather(1, kept[..., None].expand(-1, -1, seen.shape[2]))
        return model.model.multi_modal_projector(rows).numpy(), kept.numpy()


@pytest.fixture
def schedule(tmp_path: Path) -> Path:
    file = tmp_path / "longest.yaml"
    file.write_text("version: 1\nvision: [{method: longest, keep: 25%}]\n", encoding="utf-8")
    return file


def test_a_package_beside_ours_adds_a_method(
    checkpoint: Path, schedule: Path, tmp_path: Path
) -> None:
    """Its gates pass, by its own definition; and by transformers' features."""
    site, out = install(tmp_path / "site"), tmp_path / "out"
    words = ("export", "--schedule", schedule, "--model", checkpoint, "--out", out, "--json")
    done = run(site, *VTR, *words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["verified"]
    assert report["gates"]
    size = json.loads((checkpoint / "config.json").read_text())["vision_config"]["image_size"]
    pixels = np.random.default_rng(0).standard_normal((2, 3, size, size), np.float32)
    found, (wanted, kept) = features(out, pixels), defined(checkpoint, pixels)
    assert np.array_equal(found["image_source"], kept)
    assert np.allclose(found["image_features"], wanted, atol=1e-5)


def test_without_a_definition_it_is_not_verified(
    checkpoint: Path, schedule: Path, tmp_path: Path
) -> None:
    """Said before torch is imported, let alone a graph traced; --no-verify goes on."""
    site, out = install(tmp_path / "site", references={}), tmp_path / "out"
    words = ("export", "--schedule", schedule, "--model", checkpoint, "--out", out)
    done = run(site, *VTR, *words)
    assert done.returncode == 2
    assert "brings no definition" in done.stderr
    assert "--no-verify" in done.stderr
    assert "import torch" not in done.stderr
    assert not out.exists()
    assert run(site, *VTR, *words, "--no-verify", "--dry-run").returncode == 0


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"longest": "toy_reduction:Tower"}, "no VisionReduction"),
        ({"fastervlm": "vtr_export.reductions.fastervlm:FasterVLM"}, "again"),
    ],
)
def test_what_is_no_method_of_its_own_is_named(
    tmp_path: Path, schedule: Path, point: dict[str, str], words: str
) -> None:
    site = install(tmp_path / "site", reductions=point)
    done = run(site, *VTR, "schedule", "show", schedule)
    assert words in done.stderr
    assert next(iter(point)) in done.stderr
    assert "uninstall" in done.stderr
    assert done.returncode == 2, done.stderr
