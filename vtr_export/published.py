"""What every published folder has: a manifest, written last, with the hash of every other file."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from vtr_export.errors import ArtifactError

FORMAT = 1  # the newest that is understood
MANIFEST = "manifest.json"
SMALL_BYTES = 16 << 20  # files up to this size are hashed at every load
MAX_MANIFEST_BYTES = 16 << 20
_ARTIFACT = "artifact"


def _relative(path: str) -> str:
    """A POSIX path that stays in the folder it is relative to."""
    steps = path.split("/")
    if not set(steps).isdisjoint(("", ".", "..")) or re.search(r"[\\:\x00-\x1f\x7f]", path):
        raise ValueError("a path in an artifact is relative, with '/' and without '..'")
    return path


RelativePath: TypeAlias = Annotated[str, AfterValidator(_relative)]
FileName: TypeAlias = Annotated[str, Field(pattern=r"^[^/\\:\x00-\x1f\x7f]+$"), RelativePath]
Sha256: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    """What stands in a manifest: nothing more, nothing else, never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class File(Part):
    """Size and content of one file."""

    bytes: NonNegativeInt
    sha256: Sha256


class Published(Part):
    """``manifest.json`` of one kind of folder. Written last: a folder without one is nothing."""

    KIND: ClassVar[str]
    REPLACE: ClassVar[str]  # how to get such a folder again

    format: Literal[1] = 1
    files: dict[RelativePath, File]

    @model_validator(mode="after")
    def _lists_others(self) -> Self:
        if MANIFEST in self.files:
            raise ValueError("a manifest does not list itself")
        return self

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read and check a folder: every file is there in its size, small ones hash right.

        Raises ArtifactError.
        """
        folder = Path(folder)
        manifest = cls._parse(_read(folder), folder / MANIFEST)
        manifest.check_hashes(folder, full=False)
        return manifest

    @classmethod
    def _parse(cls, raw: bytes, where: Path) -> Self:
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError) as error:
            _fail(f"the manifest is not valid JSON: {error}", where, cls.REPLACE)
        found: Mapping[str, Any] = data if isinstance(data, dict) else {}
        if (kind := found.get("kind", _ARTIFACT)) != cls.KIND:
            _fail(f"the folder holds an {kind}, not an {cls.KIND}", where, f"give an {cls.KIND}")
        version = found.get("format")
        if isinstance(version, int) and version > FORMAT:
            hint = "upgrade: pip install -U vtr-export"
            _fail(f"made by a newer vtr-export (format {version}, known: {FORMAT})", where, hint)
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(step) for step in first["loc"])
            _fail(
                f"the manifest is malformed: {place or 'whole'}: {first['msg']}", where, cls.REPLACE
            )

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
            self._check_file(folder / name, expected, home, full)

    def _check_file(self, file: Path, expected: File, home: Path, full: bool) -> None:
        if not file.is_file():
            _fail(f"a file of the {self.KIND} is missing", file, self.REPLACE)
        if not file.resolve().is_relative_to(home):
            _fail(f"a file of the {self.KIND} leads out of its folder", file, self.REPLACE)
        size_bytes = file.stat().st_size
        if size_bytes != expected.bytes:
            _fail(f"damaged: {size_bytes} bytes, not {expected.bytes}", file, self.REPLACE)
        if (full or size_bytes <= SMALL_BYTES) and sha256_of(file) != expected.sha256:
            _fail("damaged: its contents are not those that were written", file, self.REPLACE)


def kind_of(folder: str | Path) -> str:
    """What a published folder holds: artifact or engine. ArtifactError when it is neither."""
    folder = Path(folder)
    try:
        kind = json.loads(_read(folder)).get("kind", _ARTIFACT)
    except (ValueError, RecursionError, AttributeError) as error:
        _fail(f"the manifest is not valid JSON: {error}", folder / MANIFEST, "publish it again")
    return str(kind)


def hash_files(folder: Path, known: Mapping[str, File] | None = None) -> dict[str, File]:
    """Every file below ``folder`` but the manifest; ``known`` ones (by path) are not read again."""
    known = known or {}
    files: dict[str, File] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            _fail("a published folder holds no symbolic links", path)
        if path.is_file() and name != MANIFEST:
            made = known.get(name)
            files[name] = made or File(bytes=path.stat().st_size, sha256=sha256_of(path))
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


def sha256_of(file: Path) -> str:
    """The hash of a file's contents; ArtifactError when it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        _fail(f"cannot be read: {error.strerror}", file, "check its permissions")


def _fail(message: str, where: Path, hint: str = "publish it again") -> NoReturn:
    raise ArtifactError(message, where=str(where), hint=hint)
