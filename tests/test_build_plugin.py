"""``vtr build-plugin``: what it needs, what it says when that is missing, and the library it makes."""

import json
import os
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from command import vtr
from test_tensorrt_builds import build, needs_tensorrt
from test_tensorrt_plugin import cut

from cut_graphs import serialized  # isort: skip  # brings torch last
from vtr_export import ops
from vtr_export.backends.tensorrt import kernel
from vtr_export.backends.tensorrt.compile_plugin import (
    Built,
    find_headers,
    read_version,
    targets_of,
)
from vtr_export.backends.tensorrt.plugin import VARIABLE, find, read_library
from vtr_export.backends.tensorrt.python_plugin import SERVED
from vtr_export.errors import UnavailableError
from vtr_export.ops.prune import FIELDS, INPUTS, OUTPUTS, PLUGIN_NAMESPACE, PLUGIN_VERSION, PRUNE

HEADERS = os.environ.get("TENSORRT_ROOT")
needs_headers = pytest.mark.skipif(
    HEADERS is None or shutil.which("nvcc") is None or shutil.which("cmake") is None,
    reason="needs nvcc, cmake, and TENSORRT_ROOT: TensorRT's C++ headers, which no wheel has",
)
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("cmake") is None, reason="needs nvcc and cmake"
)
SHELL = (kernel.sources() / "plugin.cpp").read_text(encoding="utf-8")
OLD = "#define NV_TENSORRT_MAJOR 10 //!< major\n#define NV_TENSORRT_MINOR 3\n#define NV_TENSORRT_PATCH 0\n"
NEW = "".join(
    f"#define TRT_{part}_ENTERPRISE {number}\n#define NV_TENSORRT_{part} TRT_{part}_ENTERPRISE\n"
    for part, number in (("MAJOR", 11), ("MINOR", 1), ("PATCH", 0))
)


# --- both shells are one plugin ---


def said(pattern: str) -> list[str]:
    return re.findall(pattern, SHELL)


def test_the_cpp_shell_goes_by_the_name_that_nodes_ask_for() -> None:
    (names,) = re.findall(r"NAME\[\] = .*;", SHELL)
    assert re.findall(r'"(.*?)"', names) == [PRUNE, PLUGIN_VERSION, PLUGIN_NAMESPACE]


def test_the_cpp_shell_has_the_nodes_ports_and_fields() -> None:
    ports = [name.lower() for name in said(r"enum Input \{ (.*), INPUTS")[0].split(", ")]
    assert ports == [name for i, name in enumerate(INPUTS) if [i] != shape_inputs()]
    assert tuple(said(r"enum Output \{ (.*), OUTPUTS")[0].lower().split(", ")) == OUTPUTS
    offered = said(r'\{"(\w+)", nullptr, PluginFieldType')
    written = said(r'\{"(\w+)", &fields_')
    assert offered == list(FIELDS)
    assert sorted({*written, *said(r'std::pair\("(\w+)"'), *said(r'\{"(\w+)", &')}) == sorted(
        FIELDS
    )


def shape_inputs() -> list[int]:
    values = {a.name: a.value for a in ops.prune_attributes(1.0, ops.Choice())}
    return list(values["tensorrt_plugin_shape_input_indices"])


def test_the_cpp_shell_serves_what_the_python_one_serves() -> None:
    for name, values in SERVED.items():
        assert tuple(said(rf'{name} != "(\w+)"')) == values


# --- what is missing ---


def test_an_unknown_capability_is_refused() -> None:
    done = vtr("build-plugin", "--sm", "42", "--json")
    assert (done.code, done.json["error"]["code"]) == (2, "VTR202")
    assert "121" in done.json["error"]["hint"]


def test_missing_headers_say_where_they_are(tmp_path: Path) -> None:
    done = vtr("build-plugin", "--sm", "86", "--tensorrt-root", tmp_path)
    assert done.code == 2
    assert "github.com/NVIDIA/TensorRT" in done.err
    assert str(tmp_path) in done.err


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    """A TensorRT's folder whose headers are not C++."""
    folder = tmp_path / "TensorRT" / "include"
    folder.mkdir(parents=True)
    (folder / "NvInferVersion.h").write_text(NEW)
    (folder / "NvInferRuntime.h").write_text("#error this is no TensorRT\n")
    return folder.parent


def test_a_missing_nvcc_is_named(headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", str(headers / "nvcc"))
    done = vtr("build-plugin", "--tensorrt-root", headers)
    assert done.code == 2
    assert "no nvcc is found" in done.err
    assert f"CUDACXX={headers}" in done.err


@pytest.mark.parametrize(
    ("text", "version", "targets"),
    [(OLD, "10.3.0", ("tensorrt-10",)), (NEW, "11.1.0", ("tensorrt-rtx", "tensorrt"))],
)
def test_headers_say_their_version(
    headers: Path, text: str, version: str, targets: tuple[str, ...]
) -> None:
    assert find_headers(headers) == find_headers(headers / "include") == headers / "include"
    (headers / "include" / "NvInferVersion.h").write_text(text)
    assert read_version(headers / "include") == version
    assert targets_of(version) == targets


def test_headers_that_do_not_say_their_version_are_refused(headers: Path) -> None:
    (headers / "include" / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR\n")
    with pytest.raises(UnavailableError, match="which TensorRT"):
        read_version(headers / "include")


@needs_nvcc
def test_what_does_not_compile_leaves_the_old_library(
    headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = shutil.copytree(kernel.sources(), tmp_path / "sources")
    (broken / kernel.KERNEL).write_text("#error this is no kernel\n")
    monkeypatch.setattr(kernel, "sources", lambda: broken)
    out = tmp_path / "plugins"
    out.mkdir()
    old = {out / kernel.LIBRARY: b"library", out / f"{kernel.LIBRARY}.json": b"notes"}
    for path, content in old.items():
        path.write_bytes(content)
    done = vtr("build-plugin", "--sm", "86", "--tensorrt-root", headers, "--out", out, "--json")
    assert (done.code, done.json["error"]["code"]) == (2, "VTR203")
    assert re.search("this is no (TensorRT|kernel)", done.json["error"]["message"])
    assert {path: path.read_bytes() for path in out.iterdir()} == old


# --- the library ---


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder))
        done = vtr("build-plugin", "--sm", "8.6", "--json")
    assert done.code == 0, done.err
    made = done.json
    assert set(made) == {field.name for field in fields(Built)}
    assert (made["library"], made["sms"]) == (str(folder / kernel.LIBRARY), [86])
    assert made["bytes"] == (folder / kernel.LIBRARY).stat().st_size
    return folder / kernel.LIBRARY


@needs_headers
def test_what_was_built_is_found(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(library.parent))
    found = find("auto", "tensorrt-rtx")
    assert found is not None
    assert (found.kind, found.path, found.sms) == ("library", library, (86,))
    assert sorted(path.name for path in library.parent.iterdir()) == [
        kernel.LIBRARY,
        f"{kernel.LIBRARY}.json",
    ]


@needs_headers
def test_a_library_of_other_sources_is_refused(library: Path, tmp_path: Path) -> None:
    stale = shutil.copy(library, tmp_path)
    notes = json.loads(library.with_name(f"{library.name}.json").read_text())
    changed = {**notes, "sha256": "0" * 64}
    Path(f"{stale}.json").write_text(json.dumps(changed))
    assert "sha256" in read_library(Path(stale))[1]


@needs_headers
@needs_tensorrt
@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_tensorrt_loads_the_library_and_builds(library: Path, dtype: str, tmp_path: Path) -> None:
    """The registry takes it, a cut is one layer of it, and what it keeps may exceed TopK's limit."""
    path = tmp_path / "cut.onnx"
    path.write_bytes(serialized(cut(4000, ops.Choice(rank="per_image"), dtype)))
    found = build(path, "--plugin", str(library), "--vision", "8000", "--context")
    assert found["plugins"] == [[[-1, -1, 32], [-1, -1], [-1, 4000]]]
