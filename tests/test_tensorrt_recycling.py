"""SparseVLM's cut builds in TensorRT-RTX, and what its node says arrives there."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from cut_graphs import Tracer
from test_tensorrt_builds import build, needs_tensorrt, saved

from vtr_export import ops
from vtr_export.schedule_document import Recycle

pytestmark = needs_tensorrt
RECYCLE = Recycle(share=Fraction(4, 5), each=3)
CASES: dict[str, dict[str, Any]] = {
    "last": {},  # an attribute that its parser loses on the way would be 0
    "sparsevlm": {"query": "raters", "merge": RECYCLE, "positions": "repacked"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_cut_builds_with_the_factor_of_its_layer(
    case: str, traced: Tracer, tmp_path: Path
) -> None:
    tiny = traced("fp16")
    model = tiny.cut(tiny.schedule({1: 8}, **CASES[case]))
    (scale,) = (node.attributes["scale"].as_float() for node in model.graph if ops.is_cut(node))
    found = build(saved(model, tmp_path))
    assert found["factors"] == [scale]
    assert found["layers"]["ATTENTION_INPUT"] == tiny.facts.layers
