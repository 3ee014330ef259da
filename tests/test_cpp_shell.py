"""The C++ shell created, sized and enqueued as TensorRT would, its kernels on the CPU."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from kernel_on_host import DTYPES, FLAGS, HOST, KERNELS, HostLauncher, call, compile_for_host
from test_plugin_kernel import Sizes, check, draw, prompt

from vtr_export.backends.tensorrt import kernel

TENSORRT = os.environ.get("TENSORRT_ROOT")
CUDA = next(
    (
        folder
        for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
        if home and (folder := Path(home) / "include").joinpath("cuda_runtime_api.h").is_file()
    ),
    None,
)
needs_headers = pytest.mark.skipif(
    not TENSORRT or CUDA is None or shutil.which("g++") is None,
    reason="needs g++, CUDA's headers, and TENSORRT_ROOT: TensorRT's, which no wheel has",
)
TYPES = {"fp32": 0, "fp16": 1, "bf16": 7}  # nvinfer1::DataType


class Shell(kernel.Launcher):
    """Calls the shell where another launcher calls the kernels."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.launches: list[tuple[str, tuple[int, ...]]] = []

    def launch(
        self,
        shape: kernel.Shape,
        dtype: kernel.Dtype,
        scale: float,
        heads: kernel.Heads,
        rank: kernel.Rank,
        pointers: kernel.Pointers,
        workspace: int,
        stream: int,
    ) -> None:
        made = self.create(scale, shape.query, heads, rank)
        assert made is not None
        kept = [shape.batch, shape.kept]
        dims = (
            [shape.batch, shape.heads, shape.query_rows, shape.head_dim],
            [shape.batch, shape.kv_heads, shape.total, shape.head_dim],
            [shape.batch, 1, shape.mask_rows, shape.total],
            [shape.batch, shape.vision],
            [shape.batch if rank == "joint" else 1],
            [shape.batch, shape.new, shape.hidden],
            [*kept, shape.hidden],
            kept,
            [shape.batch, shape.keep],
        )
        numbers = [number for each in dims for number in (len(each), *each)]
        said = (ctypes.c_longlong * len(numbers))(*numbers)
        given = (ctypes.c_void_p * 6)(*pointers[:6])
        outputs = (ctypes.c_void_p * 3)(*pointers[6:])
        arguments: Any = made, TYPES[dtype], said, given, outputs
        assert self.library.shell_call(*arguments, None) == kernel.workspace_bytes(shape)
        assert self.library.shell_call(*arguments, ctypes.c_void_p(workspace)) == -1
        self.library.shell_destroy(made)
        self.launches[:] = self.queued()

    def create(self, scale: float, *choice: str) -> Any:
        made = self.library.shell_create(ctypes.c_float(scale), *(c.encode() for c in choice))
        return None if made is None else ctypes.c_void_p(made)

    def queued(self) -> list[tuple[str, tuple[int, ...]]]:
        """Of the last call."""
        at = ctypes.POINTER(ctypes.c_int)()
        count = self.library.shell_launches(ctypes.byref(at))
        rows = [at[4 * i : 4 * i + 4] for i in range(count)]
        return [(KERNELS[number], tuple(grid)) for number, *grid in rows]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    library = tmp_path_factory.mktemp("shell") / "shell.so"
    includes = [f"-I{TENSORRT}/include", f"-I{CUDA}", "-w"]
    sources = [HOST / "shell.cpp", HOST / "queue.cpp"]
    subprocess.run(["g++", *FLAGS, *includes, *sources, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.shell_create.restype = ctypes.c_void_p
    loaded.shell_call.restype = ctypes.c_longlong
    return Shell(loaded)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> HostLauncher:
    return HostLauncher(compile_for_host(tmp_path_factory.mktemp("kernels")), multiprocessors=9)


@needs_headers
@pytest.mark.parametrize("asks", ["last", "text"])
@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_launches_what_python_launches(
    shell: Shell, launcher: HostLauncher, dtype: Any, heads: Any, asks: Any
) -> None:
    sizes = Sizes(2, 2, 4, 64, text=12, behind=9, image=200)
    options: Any = {"dtype": dtype, "heads": heads, "asks": asks}
    inputs = draw(sizes, 1, padded=False, keep=70, **options)
    check(shell, inputs)
    mine = call(launcher, inputs).launches
    assert call(shell, inputs).launches == mine
    assert len(mine) == (2 if asks == "last" else 3)


@needs_headers
def test_it_ranks_image_by_image_and_passes_a_generated_token(shell: Shell) -> None:
    inputs = prompt(["tvvvvvvtt"], 1, keep=2, rank="per_image")
    inputs.budget[:] = 2  # images
    check(shell, inputs)
    check(shell, draw(Sizes(text=1, image=0, past=9), 1, padded=False, keep=0, asks="text"))
    assert [name for name, _ in shell.launches] == ["vtr_prune"]


@needs_headers
@pytest.mark.parametrize("said", ["query", "heads", "rank"])
def test_it_refuses_what_no_kernel_has(shell: Shell, said: str) -> None:
    choice = {"query": "text", "heads": "mean", "rank": "joint"}
    assert shell.create(1.0, *choice.values()) is not None
    assert shell.create(1.0, *(choice | {said: "first"}).values()) is None
