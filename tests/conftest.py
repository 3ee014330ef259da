"""Options and fixtures of every test: goldens that only a developer rewrites, traced tiny models."""

import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import isfunction
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from cut_graphs import Traced, Tracer

    from vtr_export.checkpoint import Checkpoint
    from vtr_export.exporter import Report
    from vtr_export.families import ModelFacts
    from vtr_export.frontends.transformers import Graphs

    Loader = Callable[..., Graphs]

Golden = Callable[[ir.Model, Path], None]

settings.register_profile("vtr", deadline=None, derandomize=True, database=None)
settings.load_profile("vtr")
gc.set_threshold(50_000, 20, 50)  # the tracer makes millions of objects: a sixth of its time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-goldens",
        action="store_true",
        help="write graphs/*/*/after.onnxtxt anew (developers only; review the diff)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-goldens") and os.environ.get("CI"):
        raise pytest.UsageError("CI compares goldens and never writes them")


def pytest_runtest_setup() -> None:
    """Torch's exporter reads its operators' sources anew for every graph, a tenth of a trace."""
    names = [name for name in sys.modules if name.startswith("onnxscript._framework_apis.")]
    for module in map(sys.modules.__getitem__, names):
        read = vars(module).get("get_torchlib_ops")
        if isfunction(read):
            module.get_torchlib_ops = cache(read)  # type: ignore[attr-defined]


def golden_text(model: ir.Model) -> str:
    """The nodes, one a line, and the signature, one value a line.

    Our functions are files of their own in ``graphs/ops``; inferred shapes and the names of nodes
    only make a diff longer.
    """
    clone = model.clone()
    clone.functions.clear()
    outputs = set(clone.graph.outputs)
    for node in clone.graph:
        node.name = None
        for value in set(node.outputs) - outputs:
            value.type = value.shape = None
    text = ir.to_onnx_text(clone, exclude_initializers=True)
    lines = [_broken(line) if " => (" in line else line for line in text.splitlines()]
    return "\n".join(lines) + "\n"


def _broken(signature: str) -> str:
    """``name (inputs) => (outputs)`` with a value a line."""
    lines = re.sub(r", (?=[a-z0-9]+\[)", ",\n   ", signature)
    return re.sub(r"(?<= )\((?=[a-z])", "(\n   ", lines).replace(") => ", "\n) => ")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare a model with the text it should have become; fails on a missing file."""
    update = bool(request.config.getoption("--update-goldens"))

    def compare(model: ir.Model, path: Path) -> None:
        text = golden_text(model)
        if update:
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing: pytest --update-goldens writes it"
        written = ir.from_onnx_text(path.read_text(encoding="utf-8"))
        # printed again: another version of onnx may write the same graph in another way
        assert text.splitlines() == golden_text(written).splitlines()

    return compare


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> "Tracer":
    """A tiny model of a variant (``cut_graphs.VARIANTS``), traced once a session."""
    from cut_graphs import trace  # brings torch, which not every test needs

    folder = tmp_path_factory.mktemp("traced")
    known: dict[str, Traced] = {}

    def get(variant: str) -> "Traced":
        if variant not in known:
            known[variant] = trace(variant, folder)
        return known[variant]

    return get


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of three layers in several shards; tests leave it as it is."""
    from tiny_models import save_checkpoint, tiny_llava

    return save_checkpoint(tiny_llava(layers=3), tmp_path_factory.mktemp("model"), shards=2)


@pytest.fixture(scope="session")
def traced_once() -> "Loader":
    """``frontends.transformers.load``, which traces a checkpoint once a session and a dtype."""
    from vtr_export.frontends.transformers import Graphs, load

    known: dict[object, Graphs] = {}

    def get(
        checkpoint: "Checkpoint", facts: "ModelFacts", dtype: str, *, whole: bool = False
    ) -> Graphs:
        key = checkpoint.folder, checkpoint.config_sha256, dtype, whole
        graphs = known[key] = known.get(key) or load(checkpoint, facts, dtype, whole=whole)
        copies = (graphs.vision_encoder, graphs.embed_tokens, graphs.decoder)
        return Graphs(*(graph.clone() for graph in copies), held=graphs.held)

    return get


@contextmanager
def traced_by(loader: "Loader") -> Iterator[None]:
    """Exports take their graphs from it."""
    from vtr_export.frontends import transformers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers, "load", loader)
        yield


@pytest.fixture
def shared_traces(traced_once: "Loader") -> Iterator[None]:
    """Exports of this process take their graphs from ``traced_once``."""
    with traced_by(traced_once):
        yield


@pytest.fixture(scope="module")
def one_trace(traced_once: "Loader") -> Iterator[None]:
    """As ``shared_traces``, for what a module's fixtures export."""
    with traced_by(traced_once):
        yield


@contextmanager
def in_this_process() -> Iterator[None]:
    """Exports are verified in it: a child imports for longer than its gates take."""
    from vtr_export.verify import child, export

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_run", lambda folder: child.main(Path(folder)))
        yield


@pytest.fixture(scope="module")
def checked_here() -> Iterator[None]:
    """What a module exports is verified without a process of its own."""
    with in_this_process():
        yield


@pytest.fixture(scope="session")
def exported(
    checkpoint: Path, traced_once: "Loader", tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, "Report"]:
    """That model's artifact (FastV, half from layer 1 on), unverified, and its export's report."""
    from vtr_export.exporter import export
    from vtr_export.schedule import Schedule

    out = tmp_path_factory.mktemp("exported") / "artifact"
    with traced_by(traced_once):
        return out, export(Schedule.fastv(1, "50%"), checkpoint, out, verify="none")


@pytest.fixture(scope="session")
def checkpoint_fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny fp16 model whose heads are as wide as TensorRT's fused attention asks for."""
    import torch
    from tiny_models import save_checkpoint, tiny_llava

    model = tiny_llava(layers=3, hidden=64, dtype=torch.float16)
    return save_checkpoint(model, tmp_path_factory.mktemp("model-fp16"), shards=2)


@pytest.fixture(scope="session")
def artifact_fp16(
    checkpoint_fp16: Path, traced_once: "Loader", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """That model's verified fp16 artifact of two cuts, with golden vectors; tests leave it be."""
    from vtr_export.exporter import export
    from vtr_export.schedule import Schedule

    out = tmp_path_factory.mktemp("fp16") / "artifact"
    schedule = Schedule.parse("version: 1\nprefill: {keep: [16, 8, 3]}\n")
    with traced_by(traced_once), in_this_process():
        export(schedule, checkpoint_fp16, out, dtype="fp16", verify="all")
    return out


@pytest.fixture(scope="session")
def engine_fp16(artifact_fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TensorRT-RTX engines of that artifact for SM 8.6; tests leave them be."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'vtr-export[rtx]'")
    from vtr_export.builder import build

    out = tmp_path_factory.mktemp("engine") / "engine"
    build(artifact_fp16, out, sms=(86,), plugin="off")
    return out


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of ``samples/bench`` by name, and gone again afterwards."""
    folder = Path(__file__).parents[1] / "samples" / "bench"
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    yield
    for name in set(sys.modules) - before:
        if (folder / f"{name}.py").is_file():
            del sys.modules[name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("no right to mount a small tmpfs here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
