"""What the ONNX parser of TensorRT 10 takes (Jetson, JetPack 6), and what a lowered model asks.

Read in onnx-tensorrt's table of operators and importers, releases 10.0, 10.1 and 10.15, and in its
changelog for those between. Nothing here was executed: TensorRT 10 needs a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from vtr_export.schedule import Resolved
from vtr_export.schedule_document import Correlate, Recycle

VERSION: Final = "10.3"  # of JetPack 6.1 and 6.2; 6.0 still has TensorRT 8.6
OPSET: Final = 20  # 10.0 to 10.5 take 9 to 20; onnx 1.17 came with 10.6, opset 24 by 10.15


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


FLOATS: Final = _set("FLOAT FLOAT16 BFLOAT16")
NUMBERS: Final = FLOATS | {"INT32", "INT64"}
ALL: Final = NUMBERS | {"BOOL"}


@dataclass(frozen=True)
class Operator:
    """One row: types of its data, inputs that must be constants, attributes with one legal value.

    ``outputs`` is how many of its outputs may be used.
    """

    types: frozenset[str]
    constant: tuple[int, ...] = ()
    only: Mapping[str, int | str] = field(default_factory=dict)
    outputs: int = 1


def _rows(names: str, operator: Operator) -> dict[str, Operator]:
    return dict.fromkeys(names.split(), operator)


# All that exported graphs of our families hold, or could; not all that TensorRT 10 takes.
OPERATORS: Final[Mapping[str, Operator]] = {
    **_rows("ArgMin Conv Cos Erf Exp Gelu Gemm Log MatMul Pow Reciprocal", Operator(FLOATS)),
    **_rows("Sigmoid Sin Softmax Sqrt Tanh LayerNormalization", Operator(FLOATS)),
    **_rows("Add Div Max Min Mul Neg Sub", Operator(NUMBERS)),
    **_rows("Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Range", Operator(NUMBERS)),
    **_rows("And Not Or", Operator(_set("BOOL"))),
    **_rows("Cast Concat Constant Expand Gather GatherElements GatherND", Operator(ALL)),
    **_rows("Identity Reshape Shape Transpose Where", Operator(ALL)),
    "ConstantOfShape": Operator(ALL),  # fp32 alone in 10.0
    "CumSum": Operator(FLOATS, constant=(1,)),  # a loop with a step for each token
    **_rows("ReduceMax ReduceMean ReduceMin ReduceSum", Operator(NUMBERS, constant=(1,))),
    "ScatterElements": Operator(NUMBERS, only={"reduction": "none"}),
    "Slice": Operator(ALL, constant=(3,)),  # any axes from 10.3 on
    "Split": Operator(ALL, outputs=1 << 10),
    **_rows("Squeeze Unsqueeze", Operator(ALL, constant=(1,))),  # any axes from 10.7 on
    "TopK": Operator(NUMBERS, only={"sorted": 1}, outputs=2),  # k up to 3840
}
SINCE: Final[Mapping[str, str]] = {
    "Attention": "10.14",
    "RMSNormalization": "10.15",
    "RotaryEmbedding": "10.15",
    "TensorScatter": "10.15",
}  # what has to be written out before

_DECODER: Final = _set(
    "Add And Cast Concat Constant Cos Div Equal Gemm Less MatMul Mul Or Range ReduceMean Reshape "
    "Shape Sigmoid Sin Slice Softmax Sqrt Squeeze Sub Transpose Unsqueeze Where"
)
_CUT: Final = _set(
    "ConstantOfShape Expand GatherElements GatherND Greater IsNaN LessOrEqual Min ReduceSum "
    "ScatterElements TopK"
)
_CHOSEN: Final[Mapping[tuple[str, str], frozenset[str]]] = {
    ("query", "text"): _set("GreaterOrEqual Max ReduceMax"),
    ("query", "raters"): _set("GreaterOrEqual Max ReduceMax"),
    ("heads", "max"): _set("ReduceMax"),
    ("source", "next"): _set("Max"),
    ("rank", "per_image"): _set("Max"),
    ("positions", "repacked"): _set("Max"),
}


_MERGED: Final[Mapping[type[object], frozenset[str]]] = {
    Recycle: _set("ArgMin GreaterOrEqual Log Max Neg ReduceMax ReduceMin"),
    Correlate: _set("Max Not"),
}


def needed(schedule: Resolved) -> frozenset[str]:
    """Operators of a lowered decoder with the schedule's cuts."""
    if not schedule.cuts:
        return _DECODER
    chosen = (ops for (name, value), ops in _CHOSEN.items() if getattr(schedule, name) == value)
    return _DECODER.union(_CUT, _MERGED.get(type(schedule.merge), frozenset()), *chosen)


def verdict(schedule: Resolved) -> str:
    """Whether a lowered decoder parses, by the table; a sentence that begins with yes or no."""
    operators = needed(schedule)
    missing = sorted(operators - set(OPERATORS))
    if missing:
        return f"no: TensorRT {VERSION} has no {', '.join(missing)}"
    return (
        f"yes: opset {OPSET}, each of {len(operators)} operators of the lowering is in "
        f"TensorRT {VERSION}'s table; not executed"
    )
