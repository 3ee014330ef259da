"""An artifact's graphs for TensorRT 10, beside its own: other operators, the same weights."""

from dataclasses import replace
from pathlib import Path
from typing import Final

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from vtr_export.backends.tensorrt.operators import refused
from vtr_export.compile import run, tensorrt_10
from vtr_export.errors import AnalysisError
from vtr_export.manifest import Gate, Manifest
from vtr_export.verify.compare import compare
from vtr_export.verify.gates import BARS
from vtr_export.verify.golden import FOLDER, load_golden
from vtr_export.verify.sessions import Parts

SUFFIX: Final = ".tensorrt-10.onnx"


def lower_artifact(folder: Path, manifest: Manifest) -> list[Gate]:
    """Write each graph of an artifact for TensorRT 10 (``onnx/<graph>.tensorrt-10.onnx``).

    Weights stay in the files that are there. The gates are an export's, on the graphs as lowered
    (typed ones as their fp32 twins), for the golden vectors the artifact has; none without them.
    Raises AnalysisError for a graph that TensorRT 10 would not parse by its table.
    """
    for name in manifest.graphs.names():
        _write(folder / name)
    cases = [load_golden(file) for file in sorted((folder / FOLDER).glob("*.npz"))]
    parts = replace(Parts.of(folder, manifest), lowering=tensorrt_10())
    gates = compare(parts, cases, BARS[manifest.dtype]) if cases else []
    return [gate.model_copy(update={"name": f"tensorrt-10.{gate.name}"}) for gate in gates]


def _write(graph: Path) -> None:
    model = run(tensorrt_10(), ir.load(graph))
    ShapeInferencePass(data_prop=False)(model)
    if reasons := refused(model):
        raise AnalysisError(
            f"TensorRT 10 would not parse it: {reasons[0]}",
            where=graph.name,
            hint="use --target tensorrt (TensorRT 11) on the device, or report the model",
        )
    ir.save(model, graph.with_name(f"{graph.stem}{SUFFIX}"))
