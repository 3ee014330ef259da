"""The graphs of an artifact, or the engines of an engine folder, opened and checked."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vtr_export.errors import InputError, UnavailableError
from vtr_export.manifest import Manifest
from vtr_export.runtime.batch import Ints
from vtr_export.runtime.session import Session, check_version, open_session

if TYPE_CHECKING:
    from vtr_export.engine_manifest import EngineManifest


def open_graphs(
    folder: Path, device: str, threads: int | None
) -> tuple[Manifest, Sequence[Session]]:
    """Those of an artifact, for ONNX Runtime, in the order of its manifest."""
    manifest = Manifest.load(folder)
    if manifest.dtype == "bf16" and device == "cpu":
        raise UnavailableError(
            "a bf16 artifact does not run on the CPU: ONNX Runtime has no bf16 kernels there",
            where=str(folder),
            hint="run it with --device cuda, or export with --dtype fp16 or fp32",
        )
    check_version(manifest.versions.runtimes["onnxruntime"], device)
    shards, graphs = manifest.linked_shards(), manifest.graphs
    sessions = [
        open_session(folder / graph, device=device, threads=threads, shards=shards)
        for graph in graphs.names()
    ]
    return manifest, sessions


def open_engine(
    folder: Path, device: str | None, threads: int | None
) -> "tuple[EngineManifest, Sequence[Session]]":
    """Those of an engine folder, on the GPU."""
    if device == "cpu" or threads is not None:
        raise InputError(
            f"an engine runs on a GPU: it takes no {'threads' if threads else '--device cpu'}",
            where=str(folder),
            hint="leave the option out, or give the artifact the engine was built from",
        )
    from vtr_export.runtime import engine

    return engine.open_engine(folder)


def read_keeps(manifest: Manifest, keep: Sequence[int] | None) -> Ints | None:
    """The numerators of a tunable artifact, its own or ``keep``."""
    shares = [stage.keep for stage in manifest.model.stages if stage.keep is not None]
    if not manifest.tunable:
        if keep is not None:
            hint = "export it again with --tunable"
            raise InputError("this artifact's keeps are frozen", hint=hint)
        return None
    wanted = [share.numerator for share in shares] if keep is None else list(keep)
    limits = [share.denominator for share in shares]
    fits = len(wanted) == len(limits) and all(
        0 <= number <= limit for number, limit in zip(wanted, limits, strict=True)
    )
    kept = [Fraction(*pair) for pair in zip(wanted, limits, strict=False)]
    if not fits or kept != sorted(kept, reverse=True):
        raise InputError(
            f"keep {wanted} does not fit",
            hint=f"give {len(limits)} numbers out of {limits}, none a larger share than before",
        )
    return np.array(wanted, np.int64)
