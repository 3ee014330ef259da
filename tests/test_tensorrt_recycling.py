"""SparseVLM's cut builds in TensorRT-RTX, and what its node says arrives there."""

from fractions import Fraction
from pathlib import Path
from typing import Any

from cut_graphs import Tracer
from test_tensorrt_builds import build, needs_tensorrt, saved

from vtr_export import ops
from vtr_export.schedule_document import Recycle

pytestmark = needs_tensorrt
RECYCLE = Recycle(share=Fraction(4, 5), each=3)


def test_the_cut_builds_with_the_factor_of_its_layer(traced: Tracer, tmp_path: Path) -> None:
    """An attribute that is lost on the way to TensorRT would be 0."""
    tiny = traced("fp16")
    said: dict[str, Any] = {"query": "raters", "merge": RECYCLE, "positions": "repacked"}
    model = tiny.cut(tiny.schedule({1: 8}, **said))
    (scale,) = (node.attributes["scale"].as_float() for node in model.graph if ops.is_cut(node))
    found = build(saved(model, tmp_path))
    assert found["factors"] == [scale]
    assert found["layers"]["ATTENTION_INPUT"] == tiny.facts.layers
