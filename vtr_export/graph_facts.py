"""What is said of one ONNX file, in plain values: the JSON of ``vtr inspect``."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Tensor:
    """An input or output; ``axes`` says in words which of its axes count tokens."""

    name: str
    dtype: str
    shape: str
    axes: str = ""


@dataclass(frozen=True)
class LayerFound:
    """A layer: its ``attention`` in words, and what the graph tells of it (None: it does not).

    ``entry`` is the stream that enters it, ``node`` the (last) node of its attention; ``traits``
    are what that does beside softmax(scale · query · keys) · values.
    """

    index: int
    attention: str
    heads: int | None
    kv_heads: int | None
    entry: str | None
    node: str
    past_key: str | None
    masks: tuple[str, ...]
    traits: tuple[str, ...]


@dataclass(frozen=True)
class StreamFound:
    """A value with a token axis that crosses from layer to layer, before those in ``layers``.

    ``axis`` is None where tokens went in and cannot be followed. ``kind`` is residual (one after
    the other), tokens, keys, vision keys (of cross-attention), or lost.
    """

    name: str
    axis: int | None
    kind: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class StageFound:
    """A run of layers on the same tokens, and how many vision tokens those are."""

    first_layer: int
    layers: int
    keep: str


@dataclass(frozen=True)
class MaskFound:
    """A mask, the operator that makes it (or: input), and the layers that read it."""

    name: str
    made_by: str
    shape: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class CutFound:
    """A cut already in the graph: tokens dropped before a layer, and the streams narrowed there."""

    before_layer: int | None
    node: str
    keep: str
    streams: tuple[str, ...]


@dataclass(frozen=True)
class Lost:
    """Where tokens went in and the analysis lost them, and the way there from an input."""

    value: str
    node: str
    operator: str
    inputs: tuple[str, ...]
    trail: tuple[str, ...]


@dataclass(frozen=True)
class Crossing:
    """What a cut before a layer would narrow."""

    before_layer: int
    entry: str
    streams: tuple[str, ...]
    masks: tuple[str, ...]


@dataclass(frozen=True)
class GraphFacts:
    """One ONNX file; ``why_no_cuts`` says what stands in the way of a cut, if anything does."""

    file: str
    producer: str
    opset: int | None
    nodes: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    layers: tuple[LayerFound, ...]
    streams: tuple[StreamFound, ...]
    stages: tuple[StageFound, ...]
    masks: tuple[MaskFound, ...]
    why_no_cuts: str
    cuts: tuple[CutFound, ...]
    lost: tuple[Lost, ...]
    crossing: Crossing | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
