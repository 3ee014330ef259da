"""The samples that run engines: in Python on a simulation, in C++ as far as a compiler sees."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from simulated_tensorrt import Simulation, cuda_python
from test_runtime_tensorrt import QUESTION, picture, simulated, without_gpu

from vtr_export import builder
from vtr_export.engine_manifest import EngineManifest
from vtr_export.errors import InputError
from vtr_export.exporter import export
from vtr_export.frontends import transformers
from vtr_export.runtime import engine
from vtr_export.runtime.artifact import Artifact
from vtr_export.runtime.cuda import Cuda
from vtr_export.schedule import Schedule

bindings = pytest.importorskip("cuda.bindings", reason="pip install cuda-bindings")
SAMPLES = Path(__file__).parents[1] / "samples"
PROMPT = f"user : <image> {QUESTION} assistant :"


def imported(simulation: Simulation, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Both libraries stand where a script imports them."""
    version = EngineManifest.load(folder).versions.tensorrt
    module = simulation.library("tensorrt-rtx", version).trt
    patch.setitem(sys.modules, "tensorrt_rtx_bindings", module)
    patch.setattr(bindings, "runtime", cuda_python(simulation.cuda), raising=False)


@pytest.fixture
def simulation(
    engine_fp16: Path, artifact_fp16: Path, monkeypatch: pytest.MonkeyPatch
) -> Simulation:
    made = simulated(engine_fp16, artifact_fp16, monkeypatch)
    imported(made, engine_fp16, monkeypatch)
    return made


def load_sample() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy", SAMPLES / "deploy_tensorrt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def image(tmp_path: Path) -> Path:
    picture(0).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_the_sample_answers_as_the_artifact_does(
    simulation: Simulation, engine_fp16: Path, artifact_fp16: Path, image: Path
) -> None:
    said = load_sample().answer(engine_fp16, image, PROMPT, 12, None)
    loaded = Artifact.load(artifact_fp16, threads=1)
    expected = loaded.generate(picture(0), PROMPT, max_new_tokens=12)
    assert said == expected.text
    assert len(expected.token_ids) > 3


def test_the_package_speaks_to_cuda_python_itself(
    simulation: Simulation,
    engine_fp16: Path,
    artifact_fp16: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "Cuda", Cuda)
    answers = [
        Artifact.load(folder).generate(picture(1), QUESTION, max_new_tokens=6)
        for folder in (engine_fp16, artifact_fp16)
    ]
    assert answers[0].token_ids == answers[1].token_ids


def test_the_sample_opens_no_plan_that_does_not_fit(
    simulation: Simulation, engine_fp16: Path, image: Path, tmp_path: Path
) -> None:
    sample, copy = load_sample(), Path(shutil.copytree(engine_fp16, tmp_path / "engine"))
    manifest = EngineManifest.load(copy)
    for update in (
        {"sms": (89,)},
        {"versions": manifest.versions.model_copy(update={"tensorrt": "1.0"})},
    ):
        manifest.model_copy(update=update).save(copy)
        with pytest.raises(SystemExit, match="built by TensorRT"):
            sample.answer(copy, image, PROMPT, 3, None)
    manifest.save(copy)
    with (copy / "decoder.plan").open("r+b") as plan:
        plan.seek(1000)
        plan.write(b"x")
    with pytest.raises(SystemExit, match="not the file that was built"):
        sample.answer(copy, image, PROMPT, 3, None)
    assert simulation.reached == []


def test_the_sample_says_how_it_is_used() -> None:
    command = [sys.executable, str(SAMPLES / "deploy_tensorrt.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--prompt" in shown.stdout
    assert (SAMPLES / "deploy_tensorrt.py").read_text().count("\n") < 210


@without_gpu
def test_without_a_driver_the_sample_ends_plainly(engine_fp16: Path, image: Path) -> None:
    command = [sys.executable, str(SAMPLES / "deploy_tensorrt.py"), str(engine_fp16)]
    options = ["--image", str(image), "--prompt", PROMPT]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("cuda")
    assert "Traceback" not in done.stderr


# --- a budget that stays an input ---


@pytest.fixture
def tunable(
    checkpoint_fp16: Path,
    traced_once: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Path, Path]:
    """A tunable artifact and its engine folder; no TensorRT made the plans."""

    def plan(job: Any, _: object) -> dict[str, Any]:
        job.plan.write_bytes(f"plan of {job.plan.stem}".encode())
        return defaultdict(lambda: 1, plugin_layers=0)  # the other facts play no part here

    artifact, folder = tmp_path / "artifact", tmp_path / "engine"
    monkeypatch.setattr(transformers, "load", traced_once)
    monkeypatch.setattr(builder, "build_plan", plan)
    schedule = Schedule.from_keeps([16, 8, 3])
    export(schedule, checkpoint_fp16, artifact, dtype="fp16", tunable=True, verify="none")
    ranges = {"max_text_tokens": 16, "max_new_tokens": 8}
    builder.build(artifact, folder, sms=(86,), plugin="off", ranges=ranges, unverified=True)
    imported(simulated(folder, artifact, monkeypatch), folder, monkeypatch)
    return artifact, folder


def test_an_answer_ends_where_the_engine_does(tunable: tuple[Path, Path]) -> None:
    """It was built for 16 vision, 16 text and 8 new tokens."""
    loaded = Artifact.load(tunable[1])
    answer = loaded.generate([], "how many ?", max_new_tokens=100)
    assert answer.finish == "length"
    assert answer.prompt_tokens + len(answer.token_ids) == 40
    with pytest.raises(InputError, match="built for 40") as caught:
        loaded.generate([], "digit " * 40)
    assert "--max-text-tokens" in caught.value.hint


def test_one_engine_serves_many_budgets(tunable: tuple[Path, Path], image: Path) -> None:
    artifact, folder = tunable
    for keep in (None, [16, 16], [5, 0]):
        mine, theirs = (
            Artifact.load(path, keep=keep).generate(image, QUESTION, max_new_tokens=6)
            for path in (folder, artifact)
        )
        assert mine.token_ids == theirs.token_ids
        assert [len(kept) for kept in mine.kept] == (keep or [8, 3])
    said = load_sample().answer(folder, image, PROMPT, 6, None)
    assert said == Artifact.load(artifact).generate(image, PROMPT, max_new_tokens=6).text


# --- C++ ---


def headers() -> list[str]:
    """Where TensorRT's and CUDA's headers are, as far as the environment says."""
    roots = [os.environ.get(name, "") for name in ("TENSORRT_ROOT", "CUDA_HOME", "CUDA_PATH")]
    return [f"-I{root}/include" for root in [*roots, "/usr/local/cuda"] if root]


def test_the_cpp_sample_is_short() -> None:
    text = (SAMPLES / "deploy_tensorrt.cpp").read_text()
    assert text.count("\n") <= 300
    assert max(map(len, text.splitlines())) <= 100


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample on ``stand_in``'s toy engines, watched by the compiler's own checks."""
    if not shutil.which("g++"):
        pytest.skip("no g++ here: apt-get install g++")
    out = tmp_path_factory.mktemp("cpp") / "deploy_tensorrt"
    stand_in = Path(__file__).with_name("stand_in")
    options = ["-std=c++17", "-Wall", "-Wextra", "-g", f"-I{stand_in}"]
    files = [str(SAMPLES / "deploy_tensorrt.cpp"), "-o", str(out)]
    for watch in (["-fsanitize=address,undefined"], []):  # not every g++ brings them
        command = ["g++", *options, *watch, *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "cannot find" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[:2000]
    assert "deploy_tensorrt.cpp" not in done.stderr, "no warnings"
    return out


def told(binary: Path, folder: Path, *arguments: object) -> tuple[int, str, str]:
    files = [folder, folder / "pixels.bin", folder / "ids.bin"]
    command = [str(part) for part in (binary, *files, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """An engine folder of the toys; whole numbers, so that sums are exact."""
    chance = np.random.default_rng(0)
    (tmp_path / "vision_encoder.plan").write_text("vision")
    (tmp_path / "decoder.plan").write_text("decoder")
    np.save(tmp_path / "embed_tokens.npy", chance.integers(0, 9, (97, 4)).astype(np.float32))
    chance.integers(0, 9, (1, 3, 2, 2)).astype(np.float32).tofile(tmp_path / "pixels.bin")
    np.array([5, 7, 7, 7, 8, 20], np.int64).tofile(tmp_path / "ids.bin")
    return tmp_path


def toy_answer(folder: Path, steps: int) -> list[int]:
    """What ``stand_in`` makes of a right client, written from what a decoder is given."""
    table, ids = np.load(folder / "embed_tokens.npy"), np.fromfile(folder / "ids.bin", np.int64)
    sequence = table[ids].copy()
    where = np.flatnonzero(ids == 7)
    sequence[where] = np.fromfile(folder / "pixels.bin", np.float32).reshape(3, 4)
    fed, said = len(ids), list[int]()
    for step in range(steps):
        length = len(sequence)
        count = float((sequence.ravel() * (np.arange(4 * length) % 7 + 1)).sum())
        count += 3 * (length - len(where) + 1) + 5 * length
        count += 11 * np.arange(length)[-fed:].sum() + (13 * where.sum() if step == 0 else 17)
        said.append(int(count) % 97)
        sequence, fed = np.concatenate((sequence, table[said[-1:]])), 1
    return said


def test_the_cpp_loop_hands_over_all_that_a_decoder_takes(binary: Path, toy: Path) -> None:
    expected = toy_answer(toy, 40)
    code, out, err = told(binary, toy, 7, 999, 40)
    assert (code, err) == (0, "")
    assert [int(word) for word in out.split()] == expected
    end = expected[9]
    _, out, _ = told(binary, toy, 7, end, 40)
    assert [int(word) for word in out.split()] == expected[: expected.index(end)]


def test_the_cpp_sample_says_what_is_wrong(binary: Path, toy: Path) -> None:
    for spoil, arguments, said in (
        (lambda: None, [6, 999], "too few image tokens"),
        (lambda: None, [7], "IMAGE_TOKEN EOS"),
        (lambda: None, [7, 999, 3, "no.so"], "plugin does not load"),
        (
            lambda: (toy / "pixels.bin").write_bytes(b"1234"),
            [7, 999],
            "pixels.bin has another size",
        ),
        (lambda: (toy / "decoder.plan").write_text("x"), [7, 999], "does not take"),
        (lambda: (toy / "ids.bin").unlink(), [7, 999], "cannot be read"),
    ):
        spoil()
        code, out, err = told(binary, toy, *arguments)
        assert (code, out) == (1, "")
        assert said in err


@pytest.mark.skipif(
    not (os.environ.get("TENSORRT_ROOT") and shutil.which("g++")),
    reason="TENSORRT_ROOT does not say where TensorRT's headers are, which no wheel has",
)
def test_the_cpp_sample_compiles_against_tensorrts_headers(tmp_path: Path) -> None:
    options = ["-std=c++17", "-Wall", "-Wextra", "-fsyntax-only", *headers()]
    command = ["g++", *options, str(SAMPLES / "deploy_tensorrt.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
