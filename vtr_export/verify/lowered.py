"""The decoder as it is handed to TensorRT, beside the reference: its golden vectors, replayed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vtr_export.manifest import Gate, Manifest
from vtr_export.verify.compare import compare
from vtr_export.verify.gates import BARS
from vtr_export.verify.golden import FOLDER, load_golden
from vtr_export.verify.scope import SESSION_BYTES, SHARE, available_memory
from vtr_export.verify.sessions import Parts


def why_not(manifest: Manifest, weights_bytes: int) -> str:
    """Why the replay cannot be had here, or ""; ``weights_bytes`` of the decoder, as stored."""
    if not any(name.startswith(f"{FOLDER}/") for name in manifest.files):
        return f"the artifact has no golden vectors (verified: {manifest.scope})"
    try:
        import onnxruntime  # noqa: F401 -- whether it can be
    except ImportError:
        return "onnxruntime is not installed"
    stored = {"fp32": 4, "fp16": 2, "bf16": 2}[manifest.dtype]
    if weights_bytes / stored * SESSION_BYTES > SHARE * available_memory():
        return "its fp32 twin does not fit into memory"
    return ""


def check_lowered(
    folder: Path, manifest: Manifest, decoder: Path, weights: Mapping[str, Path]
) -> list[Gate]:
    """The gates of an export on ``decoder``, whose weights lie in ``weights`` by location.

    A typed graph is replayed as its fp32 twin, in ONNX Runtime.
    """
    parts = Parts.of(folder, manifest)
    homes = {part.parent for part in (parts.vision, parts.embedding)}
    stored = {file.name: file for home in homes for file in home.glob("*.data")}
    parts = replace(parts, decoder=decoder, shards={**stored, **parts.shards, **weights})
    files = sorted(name for name in manifest.files if name.startswith(f"{FOLDER}/"))
    return compare(parts, [load_golden(folder / name) for name in files], BARS[manifest.dtype])
