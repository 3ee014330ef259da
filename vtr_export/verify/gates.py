"""What counts as equal: one table of bars, and the gates measured against them."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vtr_export.manifest import Gate

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Bars:
    """What a dtype must reach; None is not asked."""

    cosine: float  # of each position's logits, at least
    difference: float | None  # largest |Δlogit|, at most
    top1: float | None  # share of positions that choose the same token, at least
    overlap: float  # mean intersection over union of the free keep-sets of a cut, at least
    near_tie: float  # relative distance of scores, and of logits, that rounding may reorder
    stream: float  # relative error of the residual stream that rounding may leave in one layer
    score: float | None  # largest |Δscore| beside the best score of its row, at most


BARS: Final[Mapping[str, Bars]] = {
    "fp32": Bars(0.99999, 1e-3, None, 0.99, near_tie=1e-5, stream=1e-4, score=1e-4),
    "fp16": Bars(0.999, None, 0.995, 0.97, near_tie=2**-7, stream=2e-2, score=None),
    "bf16": Bars(0.995, None, None, 0.95, near_tie=2**-4, stream=8e-2, score=None),
}


def at_least(name: str, measured: float, bar: float, detail: str = "") -> Gate:
    """Passes from ``bar`` upwards; what is not finite counts as -1."""
    value = float(measured) if math.isfinite(measured) else -1.0
    return Gate(name=name, passed=value >= bar, measured=value, bar=bar, detail=detail)


def at_most(name: str, measured: float, bar: float, detail: str = "") -> Gate:
    """Passes up to ``bar``; what is not finite counts as the largest number."""
    value = float(measured) if math.isfinite(measured) else sys.float_info.max
    return Gate(name=name, passed=value <= bar, measured=value, bar=bar, detail=detail)


def measured(gate: Gate) -> str:
    """What was measured, for people."""
    return "not finite" if gate.measured == sys.float_info.max else f"{gate.measured:.7g}"


def required(gate: Gate) -> str:
    """The bar and its direction, for people: a count of differences has none but 0."""
    if gate.bar == 0:
        return "0"
    return f"{'>=' if (gate.measured >= gate.bar) == gate.passed else '<='} {gate.bar:g}"


def failed_to_run(name: str, error: str) -> Gate:
    """A graph that ONNX Runtime does not open or run."""
    return at_most(f"{name}.runs", 1.0, 0.0, error)


def differing(actual: Array, expected: Array) -> float:
    """How many entries differ, to the bit; all of them when the shapes do."""
    if actual.shape != expected.shape:
        return float(max(actual.size, expected.size, 1))
    return float(np.count_nonzero(actual != expected))


def cosines(actual: Array, expected: Array) -> NDArray[np.float64]:
    """Along the last axis; NaN where a value is not finite, 1 where both are zero."""
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosine: NDArray[np.float64] = np.sum(a * b, axis=-1) / norms
    equal = np.all(a == b, axis=-1)
    return np.where(equal, 1.0, cosine)


def worst_difference(actual: Array, expected: Array) -> float:
    """Largest absolute difference, NaN when a value is none."""
    if not actual.size:
        return 0.0
    return float(np.max(np.abs(actual.astype(np.float64) - expected.astype(np.float64))))
