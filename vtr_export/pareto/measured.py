"""What is known of a method at a share: plain values, to JSON and back."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """One method, one share; ``share`` is what was left on average, ``asked`` what was wanted.

    ``flops`` are the vision encoder's, the reduction's own and the prefill's, means over the
    questions. Times are medians in ms: ``first_ms`` from pixels to the first token, ``step_ms``
    each next one. What ends with ``_ratio`` is by the unpruned model, measured in turns with it;
    ``lost`` is accuracy below it with the ends of a 95 % interval.
    """

    method: str
    phase: str
    asked: float | None
    share: float
    tokens: tuple[float, ...]  # entering each decoder layer
    accuracy: float
    lost: tuple[float, float, float]
    flops: float
    flops_ratio: float
    first_ms: float
    first_ratio: float
    step_ms: float
    step_ratio: float
    peak_bytes: int
    schedule: str


@dataclass(frozen=True)
class Refusal:
    """A method that leaves no such share, or that is not for this model."""

    method: str
    asked: float | None
    reason: str


@dataclass(frozen=True)
class Report:
    """All of one run; the first point is the unpruned model."""

    model: str
    command: str
    date: str
    machine: str
    threads: int
    questions: int
    metric: str
    repeats: int
    steps: int
    text_tokens: float
    points: tuple[Point, ...]
    refusals: tuple[Refusal, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` reads an equal report from them."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Report":
        """What ``to_json`` gave, also by way of a file."""
        points = tuple(
            Point(**{**one, "tokens": tuple(one["tokens"]), "lost": tuple(one["lost"])})
            for one in data["points"]
        )
        refusals = tuple(Refusal(**one) for one in data["refusals"])
        return cls(**{**data, "points": points, "refusals": refusals})


def front(points: Sequence[Point], cost: str) -> tuple[Point, ...]:
    """Those that no other beats: at most its ``cost`` (a field's name), at least its accuracy."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (getattr(one, cost), -one.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return tuple(best)
