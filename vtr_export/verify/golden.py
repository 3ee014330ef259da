"""Golden vectors: cases an artifact carries, replayed where neither torch nor checkpoint exist."""

import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtr_export.errors import ArtifactError
from vtr_export.manifest import Gate, Manifest
from vtr_export.runtime.decoder import PROTECTED
from vtr_export.verify.case import Array, Case, Question
from vtr_export.verify.compare import compare
from vtr_export.verify.gates import BARS
from vtr_export.verify.sessions import Parts

FOLDER = "golden"
MAX_BYTES = 8 << 20
MAX_UNPACKED_BYTES = 256 << 20
_UNREADABLE = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_ASKED = ("input_ids", "attention_mask", "position_ids", "following", "vision_index", "groups")
_IMAGES = ("images", "given", "crossing")  # several arrays each: images.pixel_values, …
_CUTS = ("kept", "kept_vision", "scores", "margins", "ties")  # one array a cut: kept.0, …

_THRESHOLD = "by_threshold"


def write_golden(cases: Sequence[Case], folder: Path) -> tuple[str, ...]:
    """Write ``<case>.npz`` files into ``folder``; return the names of the first that fit 8 MB."""
    names, room = list[str](), MAX_BYTES
    for case in cases:
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **_pack(case))
        room -= content.tell()
        if room < 0:
            break
        folder.mkdir(exist_ok=True)
        file = folder / f"{case.question.name}.npz"
        file.write_bytes(content.getbuffer())
        names.append(file.name)
    return tuple(names)


def _pack(case: Case) -> dict[str, Array]:
    arrays: dict[str, Array] = {name: getattr(case.question, name) for name in _ASKED}
    if case.question.protected is not None:
        arrays[PROTECTED] = case.question.protected
    for part in _IMAGES:
        arrays |= {f"{part}.{name}": x for name, x in getattr(case.question, part).items()}
    arrays |= {name: getattr(case, name) for name in ("tokens", "logits", "logit_ids", "features")}
    if case.by_threshold:
        arrays[_THRESHOLD] = np.array(True)
    for name in (*_CUTS, "labels"):
        arrays |= {f"{name}.{cut}": values for cut, values in enumerate(getattr(case, name))}
    return arrays


def load_golden(file: Path) -> Case:
    """One case; ArtifactError for a file that is none. Runs no code of it."""
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_UNPACKED_BYTES:
                raise ValueError(f"they unpack to more than {MAX_UNPACKED_BYTES} bytes")
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        return _unpack(file.stem, arrays)
    except _UNREADABLE as error:
        raise ArtifactError(
            f"the golden vectors cannot be read: {error}",
            where=str(file),
            hint="copy the artifact again from where it was exported",
        ) from error


def _unpack(name: str, arrays: dict[str, Array]) -> Case:
    count, recycling = (sum(n.startswith(kind) for n in arrays) for kind in ("kept.", "labels."))
    kept, kept_vision, scores, margins, ties = (
        tuple(arrays[f"{each}.{cut}"] for cut in range(count)) for each in _CUTS
    )
    images, given, crossing = (_below(arrays, part) for part in _IMAGES)
    asked: dict[str, Any] = {each: arrays[each] for each in _ASKED}
    asked[PROTECTED] = arrays.get(PROTECTED)
    return Case(
        question=Question(name, images, given, **asked, crossing=crossing),
        tokens=arrays["tokens"],
        logits=arrays["logits"],
        logit_ids=arrays["logit_ids"],
        features=arrays["features"],
        kept=kept,
        kept_vision=kept_vision,
        scores=scores,
        margins=margins,
        ties=ties,
        by_threshold=_THRESHOLD in arrays,
        labels=tuple(arrays[f"labels.{cut}"] for cut in range(recycling)),
    )


def _below(arrays: dict[str, Array], part: str) -> dict[str, Array]:
    """Those that are called ``part.<name>``, by name."""
    start = f"{part}."
    return {n.removeprefix(start): x for n, x in arrays.items() if n.startswith(start)}


def verify_artifact(path: str | Path) -> list[Gate]:
    """Hash every file of an artifact and replay its golden vectors, on ONNX Runtime alone.

    Both ways: with the keep-sets of the reference (logits), and free (keep-sets). Raises
    ArtifactError for a damaged artifact and for one without golden vectors.
    """
    folder = Path(path)
    manifest = Manifest.load(folder)
    manifest.check_hashes(folder, full=True)
    files = sorted(name for name in manifest.files if name.startswith(f"{FOLDER}/"))
    if not files:
        raise ArtifactError(
            f"the artifact carries no golden vectors (its verified scope is {manifest.scope!r})",
            where=str(folder),
            hint="export it verified and whole (--verify all), or compare with its checkpoint: "
            "vtr verify ARTIFACT --model FOLDER",
        )
    cases = [load_golden(folder / name) for name in files]
    return compare(Parts.of(folder, manifest), cases, BARS[manifest.dtype])
