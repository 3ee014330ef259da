"""Static reductions of a vision encoder build in TensorRT-RTX, on a machine without a GPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import vision_cases
from test_vision_reductions import CASES

from vtr_export import compile as compiler
from vtr_export.backends.tensorrt.library import environment
from vtr_export.reductions.registry import VISION

CHILD = Path(__file__).with_name("vision_builds_child.py")
WHEEL = "tensorrt_rtx_bindings"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(WHEEL) is None,
    reason=f"{WHEEL} is not installed: pip install 'vtr-export[rtx]' (x86-64 Linux)",
)
ENCODER = "clip"
DECIDED_BY_THE_IMAGE = {"focusllava"}  # always: refused for engines


def chosen() -> dict[str, str]:
    """By method, the first static form among the cases."""
    found: dict[str, str] = {}
    for text, encoders in CASES:
        (first, *others) = vision_cases.entries(text)
        if ENCODER in encoders and not others and first.form == "static":
            found.setdefault(first.method, text)
    return found


def serialized(model: ir.Model) -> bytes:
    """With its weights; not checked, since engines have an attribute that ONNX does not know."""
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    return bytes(ir.to_proto(model).SerializeToString())


def test_every_method_builds_in_its_static_form(tmp_path: Path) -> None:
    cases = chosen()
    assert cases.keys() == VISION.keys() - DECIDED_BY_THE_IMAGE
    files = {}
    for method, text in cases.items():
        model = vision_cases.graph_of(ENCODER, text, "fp16")
        files[method] = tmp_path / f"{method}.onnx"
        files[method].write_bytes(serialized(compiler.run(compiler.engine(), model)))
    done = subprocess.run(
        [sys.executable, CHILD, *files.values()],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    told = {Path(each["file"]).stem: each for each in map(json.loads, done.stdout.splitlines())}
    assert {method: each["errors"] for method, each in told.items() if each["errors"]} == {}
    assert done.returncode == 0, f"behind {[*told][-1:]}: {done.stderr[-2000:]}"
    assert min(each["plan_bytes"] for each in told.values()) > 0
    assert told.keys() == files.keys()
