"""``vtr doctor``: what it finds, and the command that mends it."""

import json
from pathlib import Path

import pytest
from command import vtr
from test_families import tiny

from vtr_export import doctor
from vtr_export.backends.tensorrt import kernel, library, plugin
from vtr_export.doctor import Check, examine


def found(name: str) -> Check:
    return next(check for check in examine() if check.name == name)


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions by wheel; what is not named here is as installed."""
    pretended: dict[str, str | None] = {}
    real = doctor.installed
    monkeypatch.setattr(
        doctor, "installed", lambda name: pretended[name] if name in pretended else real(name)
    )
    return pretended


def test_this_machine_can_run_and_export() -> None:
    checks = {check.name: check for check in examine()}
    for name in ("python", "onnxruntime", "CPUExecutionProvider", "torch", "transformers", "onnx"):
        assert checks[name].ok, checks[name]
    assert all(check.ok is not False for check in checks.values())


@pytest.mark.parametrize(
    ("gpu", "goes", "stays"), [(False, "onnxruntime-gpu", "cpu"), (True, "onnxruntime", "gpu")]
)
def test_of_two_onnx_runtimes_one_must_go(
    monkeypatch: pytest.MonkeyPatch, wheels: dict[str, str | None], gpu: bool, goes: str, stays: str
) -> None:
    wheels |= {"onnxruntime": "1.30.0", "onnxruntime-gpu": "1.31.0"}
    monkeypatch.setattr(doctor, "has_gpu", lambda: gpu)
    check = found("onnxruntime")
    assert check.ok is False
    assert check.found.endswith(f"overwrite each other: remove {goes}")
    assert check.remedy == (
        f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'vtr-export[{stays}]'"
    )


@pytest.mark.parametrize(("gpu", "extra"), [(False, "cpu"), (True, "gpu")])
def test_a_missing_onnx_runtime_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, wheels: dict[str, str | None], gpu: bool, extra: str
) -> None:
    wheels |= {"onnxruntime": None, "onnxruntime-gpu": None}
    monkeypatch.setattr(doctor, "has_gpu", lambda: gpu)
    assert found("onnxruntime").remedy == f"pip install 'vtr-export[{extra}]'"


def test_missing_torch_is_no_fault_but_has_a_remedy(wheels: dict[str, str | None]) -> None:
    wheels["torch"] = None
    check = found("torch")
    assert check.ok is None
    assert check.remedy == "pip install 'vtr-export[export]'"


def test_a_missing_core_wheel_is_a_fault(wheels: dict[str, str | None]) -> None:
    wheels["tokenizers"] = None
    assert found("tokenizers") == Check("tokenizers", False, "missing", "pip install tokenizers")


def test_an_old_python_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.version_info", (3, 10, 2))
    assert found("python") == Check("python", False, "3.10.2", "use Python 3.11 to 3.13")


def test_cuda_is_missed_only_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(doctor, "has_gpu", lambda: False)
    assert found("CUDAExecutionProvider").remedy == ""
    monkeypatch.setattr(doctor, "has_gpu", lambda: True)
    assert "vtr-export[gpu]" in found("CUDAExecutionProvider").remedy


def test_builders_and_compilers_are_named_with_their_versions(
    wheels: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheels |= {"cuda-bindings": "13.1.0", "tensorrt-rtx-cu13-bindings": "1.8.0"}
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'release 13.1, V13.1.9'; echo compute_86; echo compute_120\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setattr(library, "find_spec", lambda name: name if "rtx" in name else None)
    assert found("nvcc") == Check("nvcc", True, f"13.1 ({nvcc}), for SM 8.6, 12.0")
    assert found("cuda-python").found == "13.1.0"
    assert found("TensorRT-RTX").found == "1.8.0"
    assert found("TensorRT").ok is None
    assert "vtr-export[tensorrt]" in found("TensorRT").found
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert found("nvcc").ok is False


def test_missing_builders_are_no_fault(
    wheels: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheels |= {"cuda-bindings": None, "cuda-python": None}
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    assert found("nvcc").ok is None
    assert found("cuda-python").ok is None
    assert "cuda-bindings" in found("cuda-python").found


def test_the_plugin_that_is_found_is_named_and_a_refused_one_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(plugin.VARIABLE, raising=False)
    names = {check.name for check in examine()}
    assert "plugin" not in names
    assert found("plugin in Python").ok
    path = tmp_path / kernel.LIBRARY
    path.write_bytes(b"")
    monkeypatch.setenv(plugin.VARIABLE, str(path))
    assert found("plugin").ok is False
    assert found("plugin").remedy == "vtr build-plugin"
    notes = {"plugin": "VtrTopKPrune", "version": "1", "sha256": kernel.sha256()}
    notes |= {"targets": ["tensorrt"], "sms": [87, 120]}
    plugin.notes_file(path).write_text(json.dumps(notes))
    assert found("plugin") == Check("plugin", True, f"{path}, for SM 8.7, 12.0 and tensorrt")
    plugin.notes_file(path).write_text(json.dumps(notes | {"sha256": "f00d"}))
    assert "sha256 is f00d" in found("plugin").found


def test_a_python_plugin_that_could_not_run_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    assert found("plugin in Python") == Check(
        "plugin in Python", True, "builds engines; to run, it needs cuda-bindings"
    )


def test_the_command_prints_a_table_or_json() -> None:
    done = vtr("doctor")
    assert done.code == 0
    assert "ok  python" in done.out
    assert vtr("doctor", "--json").json["ok"] is True


def test_a_model_is_judged_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    said = vtr("doctor", "--model", tmp_path, "--json").json["model"]
    assert (said["layers"], said["tokens_per_image"], said["model_type"]) == (3, 4, "llava")
    assert said["weight_bytes"]["fp32"] == 2 * said["weight_bytes"]["fp16"]
    assert any("no safetensors weights" in remark for remark in said["remarks"])
    assert any("no tokenizer.json" in remark for remark in said["remarks"])


def test_a_model_that_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    done = vtr("doctor", "--model", tmp_path)
    assert done.code == 2
    assert "supported:" in done.err
    assert "llava" in done.err
