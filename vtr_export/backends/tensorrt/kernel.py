"""The kernels behind ``vtr::VtrTopKPrune``: sources, compiled by NVRTC, launched by the driver.

Compiling needs no GPU. Launching has been executed on no GPU yet. What is computed here about a
launch mirrors ``params.h``, and a test compares the two.
"""

import ctypes
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from vtr_export.errors import EngineError, UnavailableError

NAME: Final = "vtr_top_k_prune"
LIBRARY: Final = "libvtr_plugins.so"
KERNEL = "kernel.cu"
HEADERS: Final = ("params.h", "*.cuh")
DTYPES: Final = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes of an element
PARTS: Final = ("score", "text_softmax", "text_score")  # before the last launch, for each type
SCORE_THREADS, PRUNE_THREADS = 128, 1024
MOST_HEAD_DIM: Final = 512
LEAST_CHUNK, MOST_CHUNK, ITEM = 32, 256, 128
MOST_HEADS, TEXT_BLOCKS = 8, 1024
COPIED_AT_LEAST: Final = 32 << 10

Dtype = Literal["fp32", "fp16", "bf16"]
Query = Literal["last", "text"]
Heads = Literal["mean", "max"]
Rank = Literal["joint", "per_image"]


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: see ``VtrTopKPruneParams``. ``new`` is columns, ``hidden`` their width.

    ``query`` says which rows ask, and so how the work is divided.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    query_rows: int
    mask_rows: int
    total: int
    new: int
    vision: int
    keep: int
    hidden: int
    query: Query = "last"

    @property
    def kept(self) -> int:
        """Columns that survive."""
        return self.new - self.vision + self.keep

    @property
    def is_ranked(self) -> bool:
        """Whether anything has to be ranked: else one launch copies."""
        return 0 < self.keep < self.vision

    @property
    def chunk(self) -> int:
        """Keys of one block of the first launch."""
        share = _divide_up(self.batch * self.kv_heads * self.total, 512)
        return min(_divide_up(share, LEAST_CHUNK) * LEAST_CHUNK, MOST_CHUNK)

    @property
    def tile_rows(self) -> int:
        """Rows whose heads of one group are multiplied together (``text``)."""
        return {1: 8, 2: 4, 3: 2, 4: 2}.get(self.heads // self.kv_heads, 1)

    @property
    def tiles_of_rows(self) -> int:
        """Tiles of the rows that may ask (``text``)."""
        return _divide_up(max(self.new - self.vision, 1), self.tile_rows)

    @property
    def key_splits(self) -> int:
        """Blocks that share the keys of one tile of rows (``text``)."""
        wanted = _divide_up(TEXT_BLOCKS, self.batch * self.kv_heads * self.tiles_of_rows)
        return min(wanted, _divide_up(self.total, MOST_CHUNK))

    @property
    def row_splits(self) -> int:
        """Blocks that share the rows which some vision tokens are asked by (``text``)."""
        wanted = _divide_up(TEXT_BLOCKS, self.batch * _divide_up(self.vision, ITEM))
        return min(wanted, self.tiles_of_rows)

    def score_grids(self) -> dict[str, tuple[int, int, int]]:
        """What is launched before the last launch, each of ``PARTS`` on its grid."""
        if not self.is_ranked:
            return {}
        if self.query == "last":
            return {"score": (_divide_up(self.total, self.chunk), self.kv_heads, self.batch)}
        return {
            "text_softmax": (self.tiles_of_rows * self.key_splits, self.kv_heads, self.batch),
            "text_score": (_divide_up(self.vision, ITEM), self.row_splits, self.batch),
        }

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block of the last launch."""
        return 8 * self.heads + 16 * _divide_up(self.new, 32)

    def tiles(self, row_bytes: int, multiprocessors: int) -> int:
        """Blocks for one row of the batch."""
        most = max(multiprocessors // self.batch, 1)
        copies = _divide_up(self.kept * row_bytes, COPIED_AT_LEAST)
        merges = _divide_up(self.vision, ITEM) if self.is_ranked else 1
        return max(1, min(max(copies, merges), most))


class Pointers(NamedTuple):
    """Device addresses, in the order of ``VtrTopKPruneParams``."""

    query: int
    keys: int
    mask: int
    vision_index: int
    budget: int
    hidden: int
    kept_hidden: int
    indices: int
    kept_vision_index: int


class Params(ctypes.Structure):
    """``VtrTopKPruneParams``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*Pointers._fields, "workspace")),
        *((name, ctypes.c_int) for name in ("batch", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int) for name in ("query_rows", "mask_rows", "total", "length")),
        *((name, ctypes.c_int) for name in ("vision", "keep", "row_bytes", "chunk", "tiles")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("max_heads", "per_image", "wide", "text")),
    )


def sources() -> Path:
    """The folder of the sources: inside the package in a wheel, ``plugins/`` in a clone."""
    package = Path(__file__).parents[2]
    packaged = package / "plugins" / NAME
    folder = packaged if packaged.is_dir() else package.parent / "plugins" / NAME
    if not (folder / KERNEL).is_file():
        raise UnavailableError(
            "this installation lacks the sources of the plugin",
            where=str(folder),
            hint="reinstall vtr-export from its wheel or its repository",
        )
    return folder


@cache
def sha256() -> str:
    """Of everything that is compiled: the same behind both shells of the plugin."""
    digest = hashlib.sha256()
    for path in sorted(path for path in sources().iterdir() if path.suffix != ".md"):
        if path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def library_path() -> Path:
    """Where ``vtr build-plugin`` writes, unless it is told otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vtr-export" / "plugins" / LIBRARY


def compile_ptx(sm: int) -> bytes:
    """PTX for compute capability ``sm`` (86 is 8.6) and later.

    A driver refuses PTX of a newer CUDA than its own; ``compile_image`` has no such limit.
    """
    return _compile(f"compute_{sm}")


def compile_image(sm: int) -> bytes:
    """Machine code for compute capability ``sm`` alone."""
    return _compile(f"sm_{sm}")


@cache
def _compile(architecture: str) -> bytes:
    """Raises UnavailableError without NVRTC or for an architecture that it does not know."""
    nvrtc = _binding("nvrtc")
    folder = sources()
    headers = [path for pattern in HEADERS for path in sorted(folder.glob(pattern))]
    texts, names = [p.read_bytes() for p in headers], [p.name.encode() for p in headers]
    kernel = (folder / KERNEL).read_bytes()
    try:
        program = _nvrtc(
            nvrtc.nvrtcCreateProgram(kernel, KERNEL.encode(), len(names), texts, names)
        )
    except RuntimeError as error:  # cuda-bindings looks for the library at the first call
        raise UnavailableError(
            f"NVRTC is not found: {error}", hint="pip install nvidia-cuda-nvrtc"
        ) from None
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    if nvrtc.nvrtcCompileProgram(program, len(options), options)[0]:
        log = bytearray(_nvrtc(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise UnavailableError(
            f"NVRTC does not compile the kernel for {architecture}: {log.decode().strip()}",
            hint="vtr doctor says which compute capabilities there are",
        )
    what = "PTX" if architecture.startswith("compute") else "CUBIN"
    image = bytearray(_nvrtc(getattr(nvrtc, f"nvrtcGet{what}Size")(program)))
    _nvrtc(getattr(nvrtc, f"nvrtcGet{what}")(program, image))
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(image)


def workspace_bytes(shape: Shape) -> int:
    """Device memory of one call, of any content; a profile's largest shape needs the most."""
    parts = [16 * shape.batch, 4 * shape.batch * shape.vision]
    if shape.query == "text":  # rows grow as vision tokens shrink: room for as many as columns
        tiles = shape.batch * shape.kv_heads * _divide_up(shape.new, shape.tile_rows)
        items = shape.batch * _divide_up(shape.vision, ITEM)
        pairs = max(shape.heads // shape.kv_heads, MOST_HEADS)
        parts += [8 * pairs * (tiles + TEXT_BLOCKS), 4 * ITEM * (items + TEXT_BLOCKS)]
    else:
        chunks = _divide_up(shape.total, LEAST_CHUNK)
        heads = shape.batch * shape.heads
        parts += [8 * heads * chunks, 4 * heads * shape.new]
    return sum(_divide_up(part, 256) * 256 for part in parts)


def fill(
    shape: Shape,
    dtype: Dtype,
    scale: float,
    heads: Heads,
    rank: Rank,
    pointers: Pointers,
    workspace: int,
    multiprocessors: int,
) -> Params:
    """What the kernels are told of one call; EngineError for one that they cannot serve."""
    if shape.head_dim > MOST_HEAD_DIM:
        raise EngineError(
            f"the plugin serves heads of at most {MOST_HEAD_DIM}, not of {shape.head_dim}",
            hint="build with --plugin off",
        )
    row_bytes = shape.hidden * DTYPES[dtype]
    return Params(
        *pointers,
        workspace,
        shape.batch,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.query_rows,
        shape.mask_rows,
        shape.total,
        shape.new,
        shape.vision,
        shape.keep,
        row_bytes,
        shape.chunk,
        shape.tiles(row_bytes, multiprocessors),
        scale,
        heads == "max",
        rank == "per_image",
        (shape.head_dim * DTYPES[dtype]) % 16 == 0 and pointers.keys % 16 == 0,
        shape.query == "text",
    )


class Launcher:
    """The kernels in the current CUDA context, from PTX or machine code."""

    def __init__(self, image: bytes) -> None:
        driver = self.driver = _driver()
        self.module = _check(driver.cuModuleLoadData(image + b"\0"))
        names = ("vtr_prune", *(f"vtr_{part}_{dtype}" for part in PARTS for dtype in DTYPES))
        self.functions = {
            name: _check(driver.cuModuleGetFunction(self.module, name.encode())) for name in names
        }
        attribute = driver.CUdevice_attribute
        device = _check(driver.cuCtxGetDevice())
        kind = attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        self.multiprocessors: int = _check(driver.cuDeviceGetAttribute(kind, device))
        kind = attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        self._allow_shared(_check(driver.cuDeviceGetAttribute(kind, device)))

    def _allow_shared(self, most_bytes: int) -> None:
        """Let the last launch use all shared memory that a block may have."""
        attribute, prune = self.driver.CUfunction_attribute, self.functions["vtr_prune"]
        kind = attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        self.shared_bytes: int = most_bytes - _check(self.driver.cuFuncGetAttribute(kind, prune))
        kind = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(self.driver.cuFuncSetAttribute(prune, kind, self.shared_bytes))

    def launch(
        self,
        shape: Shape,
        dtype: Dtype,
        scale: float,
        heads: Heads,
        rank: Rank,
        pointers: Pointers,
        workspace: int,
        stream: int,
    ) -> None:
        """Queue one call on ``stream``; raises EngineError when CUDA refuses it."""
        if shape.shared_bytes > self.shared_bytes:
            raise EngineError(
                f"this GPU's shared memory is too small for a call of {shape.new} tokens",
                hint="build with --plugin off",
            )
        params = fill(shape, dtype, scale, heads, rank, pointers, workspace, self.multiprocessors)
        for part, grid in shape.score_grids().items():
            self._start(f"vtr_{part}_{dtype}", grid, SCORE_THREADS, 0, stream, params)
        grid = (params.tiles, shape.batch, 1)
        self._start("vtr_prune", grid, PRUNE_THREADS, shape.shared_bytes, stream, params)

    def _start(
        self,
        name: str,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        stream: int,
        params: Params,
    ) -> None:
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        block = (threads, 1, 1)
        where = shared_bytes, stream, ctypes.addressof(arguments), 0
        _check(self.driver.cuLaunchKernel(self.functions[name], *grid, *block, *where))


def launcher() -> Launcher:
    """The launcher of the current CUDA context, compiled for its device; one per context."""
    driver = _driver()
    device = _check(driver.cuCtxGetDevice())
    kinds = driver.CUdevice_attribute
    major, minor = (
        _check(driver.cuDeviceGetAttribute(kind, device))
        for kind in (
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return _launcher(int(_check(driver.cuCtxGetCurrent())), 10 * major + minor)


@cache
def _launcher(context: int, sm: int) -> Launcher:
    del context  # a module lives in one
    return Launcher(compile_image(sm))


def _binding(module: str) -> Any:
    try:
        return import_module(f"cuda.bindings.{module}")
    except ImportError as error:
        raise UnavailableError(
            f"cuda-python is not installed ({error.name or error})",
            hint="pip install cuda-bindings nvidia-cuda-nvrtc",
        ) from None


def _driver() -> Any:
    """cuda-python's driver module; UnavailableError without it or without a driver."""
    driver = _binding("driver")
    try:
        _check(driver.cuInit(0))
    except RuntimeError as error:  # what cuda-bindings raises when libcuda is not there
        raise UnavailableError(
            f"no CUDA driver is found: {error}", hint="install NVIDIA's driver; nvidia-smi shows it"
        ) from None
    return driver


def _check(answer: tuple[Any, ...]) -> Any:
    """The value of a driver call; EngineError with CUDA's own name of what went wrong."""
    status, *values = answer
    if status:
        raise EngineError(f"CUDA refuses: {status.name}", hint="vtr doctor looks at this machine")
    return values[0] if values else None


def _nvrtc(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if status:
        raise UnavailableError(f"NVRTC fails: {status.name}", hint="pip install nvidia-cuda-nvrtc")
    return values[0] if values else None


def _divide_up(count: int, by: int) -> int:
    return -(-count // by)
