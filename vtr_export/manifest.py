"""What an artifact is: its facts, where it came from, what was checked, and every file's hash."""

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from vtr_export.checkpoint import read_header
from vtr_export.errors import ArtifactError, CheckpointError
from vtr_export.families import Attends, Features, Sight
from vtr_export.published import FileName, Part, Published, RelativePath, Sha256


class Versions(Part):
    """What made the artifact, and the least that runs it."""

    vtr_export: str
    opset: PositiveInt
    # those that shaped the graphs: torch, transformers, onnx_ir, …
    packages: dict[str, str] = Field(default_factory=dict)
    runtimes: dict[str, str] = Field(default_factory=lambda: {"onnxruntime": ">=1.24"})


class Source(Part):
    """The checkpoint: a name without its place, and hashes."""

    model: str  # folder name or hub id
    config_sha256: Sha256
    shards: dict[
        FileName, Sha256
    ]  # of whole files when weights were copied, of headers when linked
    remote_code: dict[RelativePath, Sha256] = Field(default_factory=dict)  # its own, that was run


class Weights(Part):
    """Copied into the artifact, or linked: left in the shards of ``folder`` (absolute)."""

    mode: Literal["copy", "link"]
    folder: str | None = None

    @model_validator(mode="after")
    def _folder_fits(self) -> Self:
        if (self.mode == "link") != (self.folder is not None):
            raise ValueError("linked weights have a folder, copied ones have none")
        if self.folder is not None and not os.path.isabs(self.folder):  # noqa: PTH117 -- a str
            raise ValueError("the folder of linked weights is absolute")
        return self


class KeepShare(Part):
    """``numerator/denominator`` of a call's vision tokens, rounded."""

    numerator: NonNegativeInt
    denominator: PositiveInt
    rounding: Literal["floor", "ceil"] = "floor"


class Stage(Part):
    """Decoder layers from ``first_layer`` to the next stage; ``keep`` is what its cut keeps."""

    first_layer: NonNegativeInt
    keep: KeepShare | None = None  # of the first stage, which no cut precedes: None


class ScheduleFacts(Part):
    """The schedule as written and as resolved for this model."""

    text: str
    # at most, with a threshold; None where an image's tokens vary
    keep_per_layer: tuple[NonNegativeInt, ...] | None
    score_from: Literal["previous", "next"] = "previous"
    query: Literal["last", "text", "raters"] = "last"
    heads: Literal["mean", "max"] = "mean"
    rank: Literal["joint", "per_image"] = "joint"
    positions: Literal["original", "repacked"] = "original"
    drop_point: Literal["between", "inside", "attended"] = "between"


class Reduced(Part):
    """What the vision encoder leaves of an image, or a tile, of ``before`` tokens."""

    before: PositiveInt
    most: NonNegativeInt  # tokens that are left; at most, where the image decides
    is_static: bool = True


class DecoderFacts(Part):
    """What a runtime must know to feed the graphs."""

    model_type: str
    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    vocab: PositiveInt
    context: PositiveInt
    image_token_id: int | None
    tokens_per_image: PositiveInt | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None = None
    mrope: bool = False  # positions are triples
    attends: Attends = "causal"
    features: Features = "tokens"
    first_position: NonNegativeInt = 0
    answer: PositiveInt | None = None  # tokens that may follow the first call
    marked: tuple[int, ...] = ()  # tokens that have the experts of images
    crosses: tuple[NonNegativeInt, ...] = ()  # layers that attend to images as keys
    sight: Sight = "onward"
    reduced: Reduced | None = None
    stages: tuple[Stage, ...]

    @model_validator(mode="after")
    def _stages_ascend(self) -> Self:
        firsts = [stage.first_layer for stage in self.stages]
        cuts = firsts[1:]  # one before layer 0 leaves the first stage without layers
        if firsts[:1] != [0] or cuts != sorted(set(cuts)) or firsts[-1] >= self.layers:
            raise ValueError(f"stages begin at ascending layers from 0 on, not at {firsts}")
        if [stage.keep is None for stage in self.stages] != [True] + [False] * (len(firsts) - 1):
            raise ValueError("every stage but the first has a keep")
        return self


class Graphs(Part):
    """Where the graphs lie in the artifact."""

    vision_encoder: RelativePath
    embed_tokens: RelativePath
    decoder: RelativePath
    compact_cache: RelativePath | None = None  # runs once behind each prefill

    def names(self) -> tuple[str, ...]:
        """Those that are there."""
        return tuple(filter(None, self.model_dump().values()))


class Gate(Part):
    """One parity check: what was measured beside the bar it had to reach."""

    name: str
    passed: bool
    measured: FiniteFloat
    bar: FiniteFloat
    detail: str = ""


class Manifest(Published):
    """``manifest.json`` of an artifact."""

    KIND: ClassVar[str] = "artifact"
    REPLACE: ClassVar[str] = "export the model again; an artifact is not edited by hand"

    kind: Literal["artifact"] = "artifact"
    versions: Versions
    source: Source
    dtype: Literal["fp32", "fp16", "bf16"]
    weights: Weights
    weights_scanned: bool
    schedule: ScheduleFacts
    model: DecoderFacts
    graphs: Graphs
    gates: tuple[Gate, ...] = ()
    verified: bool = False
    scope: Annotated[str, Field(pattern=r"^(all|none|layers:[1-9][0-9]*)$")] = "none"
    tunable: bool = False
    timings: dict[str, FiniteFloat] = Field(default_factory=dict)  # seconds by step
    peak_rss_bytes: NonNegativeInt = 0

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.verified and not (self.gates and all(gate.passed for gate in self.gates)):
            raise ValueError("verified, but not every gate passed")
        if self.verified == (self.scope == "none"):
            raise ValueError("scope is 'none' exactly when nothing was verified")
        keeps = self.schedule.keep_per_layer
        if keeps is not None and len(keeps) != self.model.layers:
            raise ValueError(f"{len(keeps)} keeps for {self.model.layers} layers")
        missing = sorted({*self.graphs.names()} - self.files.keys())
        if missing:
            raise ValueError(f"{missing[0]} is a graph, but not among the files")
        return self

    def check_hashes(self, folder: Path, *, full: bool) -> None:
        """The same, and linked shards must have the headers the graphs were made for."""
        super().check_hashes(folder, full=full)
        self._check_linked_headers()

    def linked_shards(self) -> dict[str, Path]:
        """The checkpoint files the graphs point into, by location name; empty when copied."""
        if self.weights.folder is None:
            return {}
        return {name: Path(self.weights.folder) / name for name in self.source.shards}

    def _check_linked_headers(self) -> None:
        for name, shard in self.linked_shards().items():
            hint = f"put the checkpoint back to {shard.parent}, or export again with --weights copy"
            try:
                _, sha256 = read_header(shard)
            except CheckpointError as error:
                message = f"linked weights cannot be read: {error.message}"
                raise ArtifactError(message, where=str(shard), hint=hint) from error
            if sha256 != self.source.shards[name]:
                message = "the linked checkpoint is another one than was exported"
                raise ArtifactError(message, where=str(shard), hint=hint)
