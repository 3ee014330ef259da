"""SparseVLM exported, verified whole, and caught when it clusters or forgets otherwise."""

from pathlib import Path
from shutil import copytree

import onnx_ir as ir
import pytest

from vtr_export.exporter import export
from vtr_export.manifest import Manifest
from vtr_export.schedule import Schedule
from vtr_export.verify.compare import compare
from vtr_export.verify.gates import BARS
from vtr_export.verify.golden import FOLDER, load_golden
from vtr_export.verify.sessions import Parts

pytestmark = pytest.mark.usefixtures("one_trace", "checked_here")
SCHEDULE = """version: 1
prefill:
  score: {query: raters}
  positions: repacked
  merge: {by: recycle, share: 1/2, each: 2}
  stages: [{before_layer: 1, keep: 50%}, {before_layer: 2, keep: 25%}]
"""


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Verified; tests leave it be."""
    folder = tmp_path_factory.mktemp("sparsevlm") / "artifact"
    report = export(Schedule.parse(SCHEDULE), checkpoint, folder, verify="all")
    assert report.vision_tokens_per_layer == (16, 8 + 3, 4 + 3)  # 5 and 4 recycled
    return folder


PLANTED = {  # attribute of the cuts, its wrong value, gates that must fail
    "each": (1, {"keep_sets.counts"}),
    "numerator": (0, {"keep_sets.counts"}),
    "scale": (9.0, {"scores.cut.0", "scores.cut.1"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_cut_that_recycles_otherwise_fails_its_gates(
    name: str, artifact: Path, tmp_path: Path
) -> None:
    value, expected = PLANTED[name]
    folder = tmp_path / "artifact"
    copytree(artifact, folder)
    manifest = Manifest.load(folder)
    parts = Parts.of(folder, manifest)
    cases = [load_golden(file) for file in sorted((folder / FOLDER).iterdir())]
    assert all(gate.passed for gate in compare(parts, cases, BARS["fp32"]))
    model = ir.load(parts.decoder)
    for node in model.graph:
        if name in node.attributes and node.op_type.startswith("VtrRater"):
            node.attributes[name] = ir.convenience.convert_attribute(name, value)
    ir.save(model, parts.decoder)
    gates = compare(parts, cases, BARS["fp32"])
    assert expected <= {gate.name for gate in gates if not gate.passed}
