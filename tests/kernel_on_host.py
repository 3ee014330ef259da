"""The kernels' own source compiled for a CPU, and called as cuda-python would call the GPU's."""

import ctypes
import mmap
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vtr_export.backends.tensorrt import kernel

Array = np.ndarray[Any, Any]
DTYPES = tuple(kernel.DTYPES)
KERNELS = (
    *(f"vtr_score_{dtype}" for dtype in DTYPES),
    "vtr_prune",
    *(f"vtr_text_{part}_{dtype}" for part in ("softmax", "score") for dtype in DTYPES),
)
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-U_FORTIFY_SOURCE")
HOST = Path(__file__).parents[1] / "plugins" / "host"
STREAM = 7  # any but the default one
GUARD = 64  # bytes before everything that a kernel writes


def compile_source(source: str, out: Path) -> Path:
    """``-U_FORTIFY_SOURCE``: fibers jump between stacks, which glibc takes for a mistake."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None
    subprocess.run([compiler, *FLAGS, "-w", str(HOST / source), "-o", str(out)], check=True)
    return out


def compile_for_host(folder: Path) -> ctypes.CDLL:
    """The kernels, to be launched by ``HostLauncher``."""
    library = ctypes.CDLL(str(compile_source("vtr_top_k_prune.cpp", folder / "kernels.so")))
    library.host_workspace_bytes.restype = ctypes.c_longlong
    library.host_shared_bytes.restype = ctypes.c_longlong
    return library


class HostLauncher(kernel.Launcher):
    """Launches on the CPU: block after block, first to last or (``is_reversed``) last to first."""

    def __init__(self, library: ctypes.CDLL, multiprocessors: int = 3) -> None:
        self.library, self.multiprocessors = library, multiprocessors
        self.shared_bytes = 99 << 10
        self.is_reversed = False
        self.launches: list[tuple[str, tuple[int, ...]]] = []

    def _start(
        self,
        name: str,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        stream: int,
        params: kernel.Params,
    ) -> None:
        self.launches.append((name, tuple(grid)))
        self.library.host_order(int(self.is_reversed))
        self.library.host_start(
            KERNELS.index(name),
            ctypes.byref(params),
            (ctypes.c_uint * 3)(*grid),
            threads,
            ctypes.c_size_t(shared_bytes),
        )


@dataclass(frozen=True)
class Inputs:
    """Of one call: float arrays already hold values of ``dtype``; ``budget`` is [B] or [1].

    ``asks``: which rows of ``query`` do, "last" or "text".
    """

    query: Array
    keys: Array
    mask: Array
    vision: Array
    budget: Array
    hidden: Array
    keep: int
    dtype: str = "fp32"
    scale: float = 0.5
    heads: str = "mean"
    rank: str = "joint"
    asks: Any = "last"

    @property
    def shape(self) -> kernel.Shape:
        batch, heads, rows, width = self.query.shape
        return kernel.Shape(
            batch=batch,
            heads=heads,
            kv_heads=self.keys.shape[1],
            head_dim=width,
            query_rows=rows,
            mask_rows=self.mask.shape[2],
            total=self.keys.shape[2],
            new=self.hidden.shape[1],
            vision=self.vision.shape[1],
            keep=self.keep,
            hidden=self.hidden.shape[2],
            query=self.asks,
        )


@dataclass(frozen=True)
class Outputs:
    """``score`` is [B,V], None when nothing was ranked."""

    hidden: Array
    indices: Array
    vision: Array
    score: Array | None
    launches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)


def rounded(values: Array, dtype: str) -> Array:
    """fp32 values that ``dtype`` can hold."""
    if dtype == "fp16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bf16":
        return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return values.astype(np.float32)


def stored(values: Array, dtype: str) -> Array:
    """The bits of ``dtype``."""
    if dtype == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16 if dtype == "fp16" else np.float32)


class Guarded:
    """Memory of ``size`` bytes and what lies before it, all 0xCD; behind it nothing may be touched.

    Its address is a multiple of 16 plus ``shift``: what follows, up to 15 bytes on, is a page that
    ends the process when it is read.
    """

    def __init__(self, size: int, shift: int = 0) -> None:
        pages = -(-(size + GUARD + 16) // mmap.PAGESIZE) + 1
        self.pages = mmap.mmap(-1, pages * mmap.PAGESIZE)
        self.raw = np.frombuffer(self.pages, np.uint8)
        end = len(self.raw) - mmap.PAGESIZE
        self.raw[:end] = 0xCD
        guard = ctypes.c_void_p(self.raw.ctypes.data + end)
        assert not ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0)
        self.at, self.size = (end - size - shift) // 16 * 16 + shift, size
        self.end = end

    @property
    def pointer(self) -> int:
        return self.raw.ctypes.data + self.at

    def read(self, dtype: Any, shape: tuple[int, ...]) -> Array:
        """What was written; fails if something lies around it."""
        end = self.at + self.size
        assert (self.raw[: self.at] == 0xCD).all()
        assert (self.raw[end : self.end] == 0xCD).all()
        return self.raw[self.at : end].view(dtype).reshape(shape).copy()


def placed(values: Array, shift: int = 0) -> Guarded:
    """A copy of ``values``."""
    memory = Guarded(values.nbytes, shift)
    memory.raw[memory.at : memory.at + memory.size] = np.frombuffer(values.tobytes(), np.uint8)
    return memory


def call(launcher: kernel.Launcher, inputs: Inputs, shift: int = 0) -> Outputs:
    """One call; ``shift``: bytes by which keys and hidden states miss their alignment."""
    shape, dtype = inputs.shape, inputs.dtype
    keys, hidden = stored(inputs.keys, dtype), stored(inputs.hidden, dtype)
    given = [
        placed(stored(inputs.query, dtype)),
        placed(keys, shift=shift),
        placed(inputs.mask),
        placed(inputs.vision.astype(np.int64)),
        placed(inputs.budget.astype(np.int64)),
        placed(hidden, shift=shift),
    ]
    sizes = (shape.batch, shape.kept, shape.hidden), (shape.batch, shape.kept)
    kept = (shape.batch, shape.keep)
    made = [
        Guarded(int(np.prod(sizes[0])) * hidden.itemsize, shift=shift),
        Guarded(int(np.prod(sizes[1])) * 8),
        Guarded(int(np.prod(kept)) * 8),
    ]
    workspace = Guarded(kernel.workspace_bytes(shape))  # a multiple of 256
    pointers = kernel.Pointers(*(memory.pointer for memory in (*given, *made)))
    launches = getattr(launcher, "launches", [])
    launches.clear()
    choice: Any = dtype, inputs.scale, inputs.heads, inputs.rank
    launcher.launch(shape, *choice, pointers, workspace.pointer, STREAM)
    left = workspace.read(np.uint8, (-1,))
    if shape.is_ranked:
        taken, done = left[: 8 * shape.batch].view(np.uint32).reshape(-1, 2).T
        items = -(-shape.vision // kernel.ITEM)
        assert (done == items).all()
        assert (taken > items).all()  # every block asked until none was left
    return Outputs(
        made[0].read(hidden.dtype, sizes[0]),
        made[1].read(np.int64, sizes[1]),
        made[2].read(np.int64, kept),
        _score(left, shape) if shape.is_ranked else None,
        list(launches),
    )


def _score(workspace: Array, shape: kernel.Shape) -> Array:
    """The ranks that the kernel left in its workspace, as the scores they stand for."""
    begin, size = -(-16 * shape.batch // 256) * 256, 4 * shape.batch * shape.vision
    ranks = workspace[begin : begin + size].view(np.uint32)
    bits = np.where(ranks >> 31, ranks & np.uint32(0x7FFFFFFF), ~ranks).astype(np.uint32)
    return bits.view(np.float32).reshape(shape.batch, shape.vision)
