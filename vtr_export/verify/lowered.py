"""Graphs as they are handed to TensorRT, beside the reference: golden vectors, replayed."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

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
    folder: Path, manifest: Manifest, lowering: tuple[ir.passes.PassBase, ...]
) -> list[Gate]:
    """The gates of an export on the graphs as ``lowering`` leaves them, in ONNX Runtime.

    Typed graphs are replayed as their fp32 twins.
    """
    parts = replace(Parts.of(folder, manifest), lowering=lowering)
    files = sorted(name for name in manifest.files if name.startswith(f"{FOLDER}/"))
    return compare(parts, [load_golden(folder / name) for name in files], BARS[manifest.dtype])
