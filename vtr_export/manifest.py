"""What an artifact is: its facts, where it came from, what was checked, and every file's hash."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from vtr_export.checkpoint import read_header
from vtr_export.errors import ArtifactError, CheckpointError

FORMAT = 1  # the newest that is understood
MANIFEST = "manifest.json"
SMALL_BYTES = 16 << 20  # files up to this size are hashed at every load
MAX_MANIFEST_BYTES = 16 << 20
_REPLACE = "export the model again; an artifact is not edited by hand"


def _relative(path: str) -> str:
    """A POSIX path that stays in the folder it is relative to."""
    steps = path.split("/")
    if not set(steps).isdisjoint(("", ".", "..")) or re.search(r"[\\:\x00-\x1f\x7f]", path):
        raise ValueError("a path in an artifact is relative, with '/' and without '..'")
    return path


RelativePath: TypeAlias = Annotated[str, AfterValidator(_relative)]
FileName: TypeAlias = Annotated[str, Field(pattern=r"^[^/\\:\x00-\x1f\x7f]+$"), RelativePath]
Sha256: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class File(_Part):
    """Size and content of one file."""

    bytes: NonNegativeInt
    sha256: Sha256


class Versions(_Part):
    """What made the artifact, and the least that runs it."""

    vtr_export: str
    opset: PositiveInt
    packages: dict[str, str] = {}  # those that shaped the graphs: torch, transformers, onnx_ir, …
    runtimes: dict[str, str] = {"onnxruntime": ">=1.24"}


class Source(_Part):
    """The checkpoint: a name without its place, and hashes."""

    model: str  # folder name or hub id
    config_sha256: Sha256
    shards: dict[
        FileName, Sha256
    ]  # of whole files when weights were copied, of headers when linked


class Weights(_Part):
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


class KeepShare(_Part):
    """``numerator/denominator`` of a call's vision tokens, rounded."""

    numerator: NonNegativeInt
    denominator: PositiveInt
    rounding: Literal["floor", "ceil"] = "floor"


class Stage(_Part):
    """Decoder layers from ``first_layer`` to the next stage; ``keep`` is what its cut keeps."""

    first_layer: NonNegativeInt
    keep: KeepShare | None = None  # of the first stage, which no cut precedes: None


class ScheduleFacts(_Part):
    """The schedule as written and as resolved for this model."""

    text: str
    keep_per_layer: tuple[NonNegativeInt, ...] | None  # None where an image's tokens vary
    score_from: Literal["previous", "next"] = "previous"
    query: Literal["last", "text"] = "last"
    heads: Literal["mean", "max"] = "mean"
    rank: Literal["joint", "per_image"] = "joint"
    positions: Literal["original", "repacked"] = "original"
    drop_point: Literal["between", "inside"] = "between"


class DecoderFacts(_Part):
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


class Graphs(_Part):
    """Where the graphs lie in the artifact."""

    vision_encoder: RelativePath
    embed_tokens: RelativePath
    decoder: RelativePath


class Gate(_Part):
    """One parity check: what was measured beside the bar it had to reach."""

    name: str
    passed: bool
    measured: FiniteFloat
    bar: FiniteFloat
    detail: str = ""


class Manifest(_Part):
    """``manifest.json``. Written last: a folder without one is no artifact."""

    format: Literal[1] = 1
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
    timings: dict[str, FiniteFloat] = {}  # seconds by step
    peak_rss_bytes: NonNegativeInt = 0
    files: dict[RelativePath, File]

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.verified and not (self.gates and all(gate.passed for gate in self.gates)):
            raise ValueError("verified, but not every gate passed")
        if self.verified == (self.scope == "none"):
            raise ValueError("scope is 'none' exactly when nothing was verified")
        keeps = self.schedule.keep_per_layer
        if keeps is not None and len(keeps) != self.model.layers:
            raise ValueError(f"{len(keeps)} keeps for {self.model.layers} layers")
        missing = sorted({*self.graphs.model_dump().values()} - self.files.keys())
        if missing:
            raise ValueError(f"{missing[0]} is a graph, but not among the files")
        if MANIFEST in self.files:
            raise ValueError("a manifest does not list itself")
        return self

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read and check an artifact: every file is there in its size, small ones hash right.

        Linked shards must still have the headers the graphs were made for. Raises ArtifactError.
        """
        folder = Path(folder)
        manifest = cls._parse(_read(folder), folder / MANIFEST)
        manifest.check_hashes(folder, full=False)
        return manifest

    @classmethod
    def _parse(cls, raw: bytes, where: Path) -> "Manifest":
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError) as error:
            _fail(f"the manifest is not valid JSON: {error}", where)
        version = data.get("format") if isinstance(data, dict) else None
        if isinstance(version, int) and version > FORMAT:
            hint = "upgrade: pip install -U vtr-export"
            _fail(f"made by a newer vtr-export (format {version}, known: {FORMAT})", where, hint)
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(step) for step in first["loc"])
            _fail(f"the manifest is malformed: {place or 'whole'}: {first['msg']}", where)

    def to_json(self) -> str:
        """The same text for the same facts: sorted names, ASCII, a newline at the end."""
        data = self.model_dump(mode="json")
        return json.dumps(data, sort_keys=True, indent=2, allow_nan=False) + "\n"

    def save(self, folder: Path) -> None:
        """Write ``manifest.json`` in one step, durably: the old one or this one is there."""
        staged = folder / f"{MANIFEST}.tmp-{os.getpid()}"
        try:
            with staged.open("w", encoding="utf-8", newline="\n") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            staged.replace(folder / MANIFEST)
        finally:
            staged.unlink(missing_ok=True)

    def check_hashes(self, folder: Path, *, full: bool) -> None:
        """ArtifactError for the first file that is gone, led astray, or not what it was.

        Sizes are compared always; contents of files above 16 MiB only when ``full``.
        """
        home = folder.resolve()
        for name, expected in sorted(self.files.items()):
            file = folder / name
            if not file.is_file():
                _fail("a file of the artifact is missing", file)
            if not file.resolve().is_relative_to(home):
                _fail("a file of the artifact leads out of its folder", file)
            size_bytes = file.stat().st_size
            if size_bytes != expected.bytes:
                _fail(f"damaged: {size_bytes} bytes, not {expected.bytes}", file)
            if (full or size_bytes <= SMALL_BYTES) and _sha256(file) != expected.sha256:
                _fail("damaged: its contents are not those that were exported", file)
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
                _fail(f"linked weights cannot be read: {error.message}", shard, hint)
            if sha256 != self.source.shards[name]:
                _fail("the linked checkpoint is another one than was exported", shard, hint)


def hash_files(folder: Path, known: Mapping[str, File] | None = None) -> dict[str, File]:
    """Every file below ``folder`` but the manifest; ``known`` ones (by path) are not read again."""
    known = known or {}
    files: dict[str, File] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            _fail("an artifact holds no symbolic links", path)
        if path.is_file() and name != MANIFEST:
            made = known.get(name)
            files[name] = made or File(bytes=path.stat().st_size, sha256=_sha256(path))
    return files


def _read(folder: Path) -> bytes:
    where = folder / MANIFEST
    hint = "give a folder that vtr export published"
    if not folder.is_dir():
        _fail("no such artifact folder", folder, hint)
    if not where.is_file():
        _fail(f"not an artifact: it has no {MANIFEST}", folder, hint)
    try:
        if where.stat().st_size > MAX_MANIFEST_BYTES:
            _fail(f"the manifest is larger than {MAX_MANIFEST_BYTES} bytes", where)
        return where.read_bytes()
    except OSError as error:
        _fail(f"the manifest cannot be read: {error.strerror}", where, "check its permissions")


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        _fail(f"cannot be read: {error.strerror}", file, "check its permissions")


def _fail(message: str, where: Path, hint: str = _REPLACE) -> NoReturn:
    raise ArtifactError(message, where=str(where), hint=hint)
