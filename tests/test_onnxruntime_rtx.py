"""The sample for ONNX Runtime's TensorRT-RTX provider, as far as a CPU goes."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "samples" / "onnxruntime_rtx.py"


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import onnxruntime_rtx

    return onnxruntime_rtx


def bounds(least: list[int], best: list[int], most: list[int]) -> dict[str, list[int]]:
    return {"least": least, "best": best, "most": most}


def test_one_profile_covers_both_of_an_engine(sample: ModuleType) -> None:
    context = {
        "inputs_embeds": bounds([1, 1, 8], [1, 20, 8], [4, 30, 8]),
        "past_key_values.0.key": bounds([1, 2, 0, 4], [1, 2, 0, 4], [4, 2, 50, 4]),
    }
    generation = {
        "inputs_embeds": bounds([1, 1, 8], [1, 1, 8], [4, 1, 8]),
        "past_key_values.0.key": bounds([1, 2, 1, 4], [1, 2, 20, 4], [4, 2, 60, 4]),
    }
    plans = [
        {"component": "vision_encoder", "profiles": []},
        {"component": "decoder", "profiles": [{"inputs": context}, {"inputs": generation}]},
    ]
    assert sample.ranges({"engines": plans}, "decoder") == {
        "nv_profile_min_shapes": "inputs_embeds:1x1x8,past_key_values.0.key:1x2x0x4",
        "nv_profile_opt_shapes": "inputs_embeds:1x20x8,past_key_values.0.key:1x2x0x4",
        "nv_profile_max_shapes": "inputs_embeds:4x30x8,past_key_values.0.key:4x2x60x4",
    }


@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx") is not None,
    reason="the provider is installed",
)
def test_without_the_provider_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(tmp_path)]
    command += ["--image", "scene.png", "--prompt", "?"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "pip install onnxruntime-ep-nv-tensorrt-rtx"
