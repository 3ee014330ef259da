"""The canonical decoder with cuts parses and builds in TensorRT-RTX, on a machine without a GPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from cut_graphs import Tracer, serialized

from vtr_export.backends.tensorrt.library import environment
from vtr_export.builder import build as engines
from vtr_export.exporter import export
from vtr_export.schedule import Schedule
from vtr_export.schedule_document import Correlate

REFUSED = {"TRT_decomposable", "softmax_precision"}  # by ONNX Runtime; by TensorRT
ROOT = Path(__file__).parents[1]
CHILD = Path(__file__).with_name("tensorrt_child.py")
WHEEL = "tensorrt_rtx_bindings"
needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec(WHEEL) is None,
    reason=f"{WHEEL} is not installed: pip install 'vtr-export[rtx]' (x86-64 Linux)",
)
pytestmark = needs_tensorrt
CASES: dict[str, tuple[dict[int, int], dict[str, Any]]] = {
    "uncut": ({}, {}),
    "last": ({1: 8, 2: 3}, {}),
    "text_max_and_nothing_left": ({1: 8, 2: 0}, {"query": "text", "heads": "max"}),
    "next_text": ({0: 9, 2: 4}, {"source": "next", "query": "text"}),
    "inside": ({1: 8, 2: 3}, {"drop_point": "inside"}),
    "repacked": ({1: 8, 2: 3}, {"positions": "repacked"}),
    "repacked_next": ({0: 8, 1: 3}, {"positions": "repacked", "source": "next"}),
    "per_image": ({1: 8, 2: 3}, {"rank": "per_image"}),
    "self_cross": ({1: 8, 2: 3}, {"rule": "self_cross", "query": "text", "drop_point": "inside"}),
    "correlate": (
        {1: 8, 2: 3},
        {"rule": "redundancy", "drop_point": "attended", "merge": Correlate()},
    ),
}
TOPS = {"correlate": 2}  # TopK of a cut: of its tokens, and of those that each dropped one goes to


def build(path: Path, *options: str) -> dict[str, Any]:
    """What TensorRT made of a decoder that holds its weights; fails with its own words."""
    done = subprocess.run(
        [sys.executable, CHILD, path, *options],
        env=environment(path.parent),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["errors"]:
        raise AssertionError("\n".join(found["errors"]))
    assert found["plan_bytes"] > 0
    return found


def saved(model: ir.Model, folder: Path) -> Path:
    path = folder / "decoder.onnx"
    path.write_bytes(serialized(model))
    return path


@pytest.mark.parametrize("case", CASES)
def test_a_decoder_with_cuts_builds_with_fused_attention(
    case: str, traced: Tracer, tmp_path: Path
) -> None:
    """No plan comes without a fused kernel: nothing allows TensorRT to decompose an Attention."""
    tiny = traced("fp16")
    cuts, options = CASES[case]
    model = tiny.cut(tiny.schedule(cuts, **options))
    nodes = [*model.graph, *(node for function in model.functions.values() for node in function)]
    assert not any(set(node.attributes) & REFUSED for node in nodes)
    found = build(saved(model, tmp_path))
    layers, types = found["layers"], found["types"]
    assert layers["ATTENTION_INPUT"] == tiny.facts.layers
    assert layers.get("SOFTMAX", 0) == len(cuts)
    assert layers.get("TOPK", 0) == TOPS.get(case, 1) * len(cuts)
    assert types["ATTENTION_INPUT"] == {"HALF": tiny.facts.layers}
    assert set(found["matrices"]) == {"HALF"}
    assert bool(found["factors"]) == bool(cuts)
    assert all(found["factors"])  # an attribute that is lost on the way is 0
    assert set(types["REDUCE"]) <= {"FLOAT", "INT64"}  # norms
    for kind in ("SOFTMAX", "TOPK"):
        assert set(types.get(kind, {})) <= {"FLOAT"}
    assert found["shape_inputs"] == []


def test_a_budget_can_stay_an_input(traced: Tracer, tmp_path: Path) -> None:
    tiny = traced("fp16")
    model = tiny.cut(tiny.schedule({1: 8, 2: 3}), tunable=True)
    found = build(saved(model, tmp_path))
    assert found["shape_inputs"] == ["keep"]


def test_the_sample_builds_with_and_without_the_plugin(tmp_path: Path) -> None:
    """With what compacts its cache: an engine of its own, of TensorRT's layers either way."""
    sample, artifact = ROOT / "samples" / "digits", tmp_path / "artifact"
    said = (sample / "gsearch.yaml").read_text(encoding="utf-8")
    schedule = Schedule.parse(said.replace("decode: []", "decode: [{method: mustdrop}]"))
    done = export(schedule, sample / "model", artifact, dtype="fp16", verify="none")
    assert done.vision_tokens_per_layer is not None
    cuts = len(set(done.vision_tokens_per_layer)) - 1
    for plugin, layers in (("off", 0), ("on", cuts)):
        options: dict[str, Any] = {"plugin": plugin, "unverified": True}
        built = engines(artifact, tmp_path / plugin, sms=(86, 89, 120), **options)
        assert built.sms == (86, 89, 120)
        assert [engine["plugin_layers"] for engine in built.engines] == [0, layers, 0]
        assert [engine["unfused_attentions"] for engine in built.engines] == [0, 0, 0]
