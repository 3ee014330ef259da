"""The benchmarks' own parts: checkpoints that load, children that are measured, n x n that is seen."""

import subprocess
import sys
from importlib import import_module as load
from pathlib import Path

import onnxruntime
import pytest

BENCH = Path(__file__).parents[1] / "samples" / "bench"
SCRIPTS = (
    "analysis_cost",
    "export_cost",
    "loading",
    "prefill",
    "baseline",
    "memory",
    "methods",
    "sample_table",
    "gpu_onnxruntime",
    "build_cost",
)


def test_checkpoints_load_whole(bench: None, tmp_path: Path) -> None:
    """transformers misses nothing and finds nothing it does not know, in either kind of file."""
    from transformers import LlavaForConditionalGeneration

    from vtr_export.checkpoint import Checkpoint

    models = load("models")
    for sparse in (False, True):
        folder = tmp_path / f"sparse-{sparse}"
        folder.mkdir()
        parameters = models.build("tiny", folder, "fp16", sparse=sparse, shard_gb=4e-4)
        assert len(Checkpoint.open(folder).shards) > 1
        model, found = LlavaForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True
        )
        assert not any(found.values())
        assert parameters == sum(weight.numel() for weight in model.state_dict().values())
        norm = model.model.language_model.norm.weight
        assert float(norm.detach().float().sum()) == (0 if sparse else norm.numel())


def test_a_child_is_measured_apart(bench: None) -> None:
    measure = load("measure")
    program = "import json; held = b'x' * (200 << 20); print(json.dumps({'held': len(held)}))"
    usage = measure.child(sys.executable, "-c", program)
    assert usage.report == {"held": 200 << 20}
    assert usage.peak_bytes > 200 << 20
    with pytest.raises(SystemExit, match="out of luck"):
        measure.child(sys.executable, "-c", "raise SystemExit('out of luck')")


def test_rounds_go_back_and_forth(bench: None) -> None:
    measure, order = load("measure"), []
    calls = {name: lambda n=name: order.append(n) or len(order) for name in "ab"}
    found = measure.in_turns(calls, 2)
    assert "".join(order) == "baabba"
    assert found == {"a": [3, 6], "b": [4, 5]}
    assert measure.ratio([2, 9, 4], [1, 1, 1]) == 4


def test_only_masks_may_be_square(bench: None) -> None:
    memory, kernels = load("memory"), load("kernels")
    lengths = {2944, 1504}

    def squares(*outputs: tuple[str, tuple[int, ...]]) -> list[str]:
        run = kernels.Kernel("node", "MatMul", 1.0, outputs)
        return [dtype for dtype, *_ in memory._squares([run], lengths)]

    assert squares(("float", (1, 16, 2944, 2944))) == ["float"]
    assert squares(("int64", (1, 1504, 2944)), ("bool", (1, 1, 1504, 1504))) == ["int64", "bool"]
    assert squares(("float", (1, 2944, 1024)), ("float", (1, 16, 1, 1504))) == []


def test_a_steep_list_fits_every_model(bench: None) -> None:
    steep = load("prefill").steep
    assert steep(5, 576) == [576, 576, 461, 369, 295]
    assert steep(3, 4) == [4, 4, 4]
    assert steep(40, 576)[-1] == 16


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_how_it_is_used(script: str) -> None:
    command = [sys.executable, str(BENCH / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--tiny" in done.stdout
    assert "--threads" in done.stdout


def test_the_script_for_a_gpu_runs_on_a_cpu(
    bench: None, shared_traces: None, tmp_path: Path
) -> None:
    """A row a schedule; its artifacts are made here, where one trace serves all."""
    from vtr_export.exporter import export

    script, model = load("gpu_onnxruntime"), tmp_path / "tiny-fp16"
    model.mkdir()
    load("models").build("tiny", model, "fp16")
    plans = script.plans_of(script.facts_of(model))
    for number, schedule in enumerate(plans.values()):
        out = tmp_path / f"tiny-fp16-link-{number}"
        export(schedule, model, out, dtype="fp16", weights="link", verify="none")
    report = tmp_path / "report.md"
    command = [sys.executable, str(BENCH / "gpu_onnxruntime.py"), "--device", "cpu", "--tiny"]
    command += ["--runs", "1", "--threads", "1", "--work", str(tmp_path), "--report", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "export " not in done.stderr
    lines = [line.split("|") for line in report.read_text().splitlines() if line.startswith("| ")]
    assert [line[1].strip() for line in lines[1:]] == list(plans)
    tokens = [int(line[2]) for line in lines[1:]]
    assert tokens[0] == tokens[-1] == max(tokens) > min(tokens)
    assert all(float(line[6]) >= 1 for line in lines[1:-1])
    assert float(lines[-1][6]) < 1


def test_without_its_gpu_it_writes_nothing(bench: None, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is here: only a machine without it is refused")
    command = [sys.executable, str(BENCH / "gpu_onnxruntime.py"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no CUDAExecutionProvider" in done.stderr
    assert not (tmp_path / "work").exists()
