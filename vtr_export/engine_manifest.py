"""What an engine folder is: which plans, built by what for what, and from which artifact."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt, model_validator

from vtr_export.errors import EngineError
from vtr_export.manifest import Manifest
from vtr_export.published import Part, Published, RelativePath, Sha256

Component = Literal["vision_encoder", "decoder", "compact_cache"]
Shape = tuple[NonNegativeInt, ...]


class Bounds(Part):
    """The shapes (of ``keep``: the values) of one input that a profile covers."""

    least: Shape
    best: Shape
    most: Shape

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if not len(self.least) == len(self.best) == len(self.most):
            raise ValueError("the bounds differ in rank")
        if any(not a <= b <= c for a, b, c in zip(self.least, self.best, self.most, strict=True)):
            raise ValueError(f"{self.least} to {self.most} by {self.best} does not ascend")
        return self


class Profile(Part):
    """One optimisation profile; its place in the list is its number in the plan."""

    name: Literal["images", "context", "generation", "compaction"]
    inputs: dict[str, Bounds]


class Engine(Part):
    """One plan: where it lies, what it holds, and what building it took."""

    component: Component
    file: RelativePath
    profiles: tuple[Profile, ...]
    plugin_layers: NonNegativeInt
    layers: PositiveInt  # of the network TensorRT was given
    unfused_attentions: NonNegativeInt = 0  # those whose heads no fused kernel takes
    weights_bytes: NonNegativeInt | None = None  # on the GPU, if the builder says
    seconds: FiniteFloat
    peak_rss_bytes: NonNegativeInt  # of the process that built it


class Builder(Part):
    """What built the plans; they run with the same version only."""

    vtr_export: str
    target: Literal["tensorrt", "tensorrt-rtx"]
    tensorrt: str


class PluginFacts(Part):
    """The plugin that the plans call."""

    version: str
    sha256: Sha256  # of the kernel's sources


class Ranges(Part):
    """How much a call may bring; ``opt_*`` is what the kernels are chosen for.

    Tokens are those of one prompt; a conversation may grow to the sum of the three maxima.
    """

    max_batch: PositiveInt
    max_vision_tokens: NonNegativeInt
    max_text_tokens: PositiveInt
    max_new_tokens: PositiveInt
    opt_batch: PositiveInt
    opt_vision_tokens: NonNegativeInt
    opt_text_tokens: PositiveInt
    opt_new_tokens: PositiveInt

    @property
    def max_tokens(self) -> int:
        """The longest sequence the cache holds."""
        return self.max_vision_tokens + self.max_text_tokens + self.max_new_tokens


class Request(Part):
    """What was asked for; the same request on the same artifact gives the same engine."""

    sms: tuple[PositiveInt, ...]  # empty where the builder takes the GPU that is there
    plugin: Literal["auto", "on", "off"]
    ranges: Ranges
    workspace_bytes: PositiveInt | None = None
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None


class EngineManifest(Published):
    """``manifest.json`` of an engine folder; ``artifact`` is the manifest of what was built."""

    KIND: ClassVar[str] = "engine"
    REPLACE: ClassVar[str] = "build it again: vtr build ARTIFACT; an engine is not edited by hand"

    kind: Literal["engine"] = "engine"
    versions: Builder
    sms: tuple[PositiveInt, ...]  # 86 is SM 8.6
    plugin: PluginFacts | None
    artifact_sha256: Sha256  # of its manifest.json
    artifact: Manifest
    request: Request
    engines: tuple[Engine, ...]
    embeddings: RelativePath  # [vocab, D], numpy's format; bf16 as its bits in uint16
    opened_cuts: tuple[NonNegativeInt, ...] = ()  # those that could drop nothing in these profiles
    seal: Sha256 | None = None  # of this text without it: what vouches for plans is itself whole

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        wanted = ["vision_encoder", "decoder"]
        wanted += ["compact_cache"] * (self.artifact.graphs.compact_cache is not None)
        if [engine.component for engine in self.engines] != wanted:
            raise ValueError(f"an engine folder of this artifact has {', '.join(wanted)}")
        missing = {*(e.file for e in self.engines), self.embeddings} - self.files.keys()
        if missing:
            raise ValueError(f"{min(missing)} is not among the files")
        if (self.plugin is not None) != any(engine.plugin_layers for engine in self.engines):
            raise ValueError("the plugin is named exactly when a plan calls it")
        return self

    @classmethod
    def _parse(cls, raw: bytes, where: Path) -> Self:
        manifest = super()._parse(raw, where)
        if raw != _sealed(json.loads(raw)).encode():
            raise EngineError(
                "the manifest is not the one that was written", where=str(where), hint=cls.REPLACE
            )
        return manifest

    def to_json(self) -> str:
        """As of every manifest, and sealed."""
        return _sealed(self.model_dump(mode="json"))

    def engine(self, component: Component) -> Engine:
        """The plan of one component."""
        return next(engine for engine in self.engines if engine.component == component)

    def check_library(self, target: str, version: str) -> None:
        """EngineError unless this TensorRT built the plans."""
        built = self.versions
        if (target, version) == (built.target, built.tensorrt):
            return
        raise EngineError(
            f"built by {built.target} {built.tensorrt}, but this is {target} {version}",
            hint=f"install {built.target} {built.tensorrt}, or build again: vtr build ARTIFACT",
        )

    def check_device(self, sm: int) -> None:
        """EngineError unless the plans were built for a GPU of compute capability ``sm``."""
        if sm in self.sms:
            return
        known = ", ".join(map(str, self.sms))
        raise EngineError(
            f"built for SM {known}, but this GPU is SM {sm}",
            hint=f"build again for it: vtr build ARTIFACT --sm {sm}",
        )

    def check_plugin(self, version: str | None, sha256: str | None) -> None:
        """EngineError unless the plugin at hand (None: there is none) is the one built with."""
        if self.plugin is None or (version, sha256) == (self.plugin.version, self.plugin.sha256):
            return
        found = "none is found" if version is None else f"version {version} ({sha256}) is found"
        raise EngineError(
            f"built with plugin VtrTopKPrune {self.plugin.version} ({self.plugin.sha256}), {found}",
            hint="vtr doctor says what is found; vtr build-plugin makes it, or build again "
            "with --plugin off",
        )


def _sealed(data: dict[str, Any]) -> str:
    """The canonical text of ``data``, with the hash of it without that hash."""
    bare = _text(data | {"seal": None})
    return _text(data | {"seal": hashlib.sha256(bare.encode()).hexdigest()})


def _text(data: dict[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, indent=2, allow_nan=False) + "\n"
