"""Engines as sessions: what is checked before a plan is opened, and what is done with it after.

No GPU runs here: the plans are real, CUDA and TensorRT are ``simulated_tensorrt``.
"""

import itertools
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from command import vtr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from simulated_tensorrt import HostCuda, Simulation

from vtr_export import published
from vtr_export.backends.tensorrt import plugin
from vtr_export.engine_manifest import EngineManifest
from vtr_export.errors import ArtifactError, EngineError, InputError, UnavailableError, VtrError
from vtr_export.manifest import Manifest
from vtr_export.runtime import bfloat16, engine
from vtr_export.runtime.artifact import Artifact, Request
from vtr_export.runtime.conversation import Conversation
from vtr_export.runtime.cuda import Cuda
from vtr_export.runtime.device_memory import Block, Pool
from vtr_export.runtime.embedding import EmbeddingTable
from vtr_export.runtime.ranges import Profile, Range, choose
from vtr_export.runtime.sampling import Options
from vtr_export.runtime.session import Resident, open_session
from vtr_export.runtime.tensorrt import Gpu, Plan, TensorRT

QUESTION = "what colour is the seven ?"
GRAPHS = ("vision_encoder", "decoder_model_merged")


def has_gpu() -> bool:
    try:
        Cuda()
    except UnavailableError:
        return False
    return True


HAS_GPU = has_gpu()
without_gpu = pytest.mark.skipif(HAS_GPU, reason="a GPU is here: only a machine without refuses")


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (41, 50, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def simulated(
    folder: Path, artifact: Path, patch: pytest.MonkeyPatch, *, rows: int = 1
) -> Simulation:
    """The plans of ``folder``, run as the graphs of ``artifact``, for up to ``rows`` rows."""
    manifest, simulation = EngineManifest.load(folder), Simulation()
    for made, graph in zip(manifest.engines, GRAPHS, strict=True):
        profiles = [
            {
                name: (b.least, b.most if name == "keep" else (b.most[0] * rows, *b.most[1:]))
                for name, b in profile.inputs.items()
            }
            for profile in made.profiles
        ]
        plan, file = (folder / made.file).read_bytes(), artifact / "onnx" / f"{graph}.onnx"
        simulation.serve(plan, str(file), profiles, [n for n in profiles[0] if n == "keep"])
    version, ours = manifest.versions.tensorrt, plugin.in_python()
    standing = SimpleNamespace(
        version=ours.version,
        sha256=ours.sha256,
        path=ours.path,
        sms=(),
        why_it_cannot_run=lambda: None,
        register=lambda library: simulation.reached.append("plugin"),
    )
    patch.setattr(engine, "load", lambda target: simulation.library(target, version))
    patch.setattr(engine, "Cuda", lambda: simulation.cuda)
    patch.setattr(plugin, "find", lambda *_, **__: standing)
    return simulation


# --- a call and its profile ---

PROFILES = (
    Profile(
        {
            "inputs_embeds": Range((1, 1, 8), (2, 30, 8)),
            "vision_index": Range((1, 0), (2, 20)),
            "past_key_values.0.key": Range((1, 2, 0, 4), (2, 2, 40, 4)),
            "keep": Range((1,), (1,)),
        },
        {"keep": Range((0,), (16,))},
    ),
    Profile(
        {
            "inputs_embeds": Range((1, 1, 8), (2, 1, 8)),
            "vision_index": Range((1, 0), (2, 0)),
            "past_key_values.0.key": Range((1, 2, 1, 4), (2, 2, 40, 4)),
            "keep": Range((1,), (1,)),
        },
        {"keep": Range((0,), (16,))},
    ),
)


def shapes(batch: int, length: int, vision: int, past: int) -> dict[str, tuple[int, ...]]:
    return {
        "inputs_embeds": (batch, length, 8),
        "vision_index": (batch, vision),
        "past_key_values.0.key": (batch, 2, past, 4),
        "keep": (1,),
    }


@pytest.mark.parametrize(
    ("call", "profile"),
    [
        ((1, 30, 20, 0), 0),
        ((2, 1, 0, 40), 1),  # one token more
        ((1, 1, 0, 0), 0),  # a prompt of one token: nothing came before
        ((1, 2, 0, 40), 0),  # a later turn
        ((1, 1, 1, 5), 0),
    ],
)
def test_a_call_runs_in_the_profile_made_for_it(call: tuple[int, ...], profile: int) -> None:
    assert choose(PROFILES, shapes(*call), {"keep": (3,)}, "") == profile


@pytest.mark.parametrize(
    ("call", "keep", "said", "flag"),
    [
        ((3, 30, 20, 0), 3, "dimension 0 is 3, the engine takes 1 to 2", "--max-batch"),
        ((1, 41, 21, 0), 3, "vision_index: dimension 1 is 21", "--max-vision-tokens"),
        ((1, 31, 20, 0), 3, "inputs_embeds: dimension 1 is 31", "--max-text-tokens"),
        ((1, 1, 0, 41), 3, "past_key_values.0.key: dimension 2 is 41", "--max-new-tokens"),
        ((3, 31, 21, 41), 3, "dimension 0 is 3", "--max-batch"),
        ((1, 30, 20, 0), 17, "keep: a value is 17, the engine takes 0 to 16", "no flag"),
        ((0, 30, 20, 0), 3, "dimension 0 is 0", "no flag"),
    ],
)
def test_a_call_that_no_profile_takes_names_range_and_flag(
    call: tuple[int, ...], keep: int, said: str, flag: str
) -> None:
    with pytest.raises(InputError) as caught:
        choose(PROFILES, shapes(*call), {"keep": (keep,)}, "decoder.plan")
    assert said in caught.value.message
    assert flag in caught.value.hint
    assert caught.value.where == "decoder.plan"


def test_images_are_widened_by_rows_or_by_their_tokens() -> None:
    profile = Profile({"pixel_values": Range((1, 3, 4, 4), (1, 3, 4, 4))}, {})
    with pytest.raises(InputError) as caught:
        choose([profile], {"pixel_values": (2, 3, 4, 4)}, {}, "")
    assert "--max-batch or --max-vision-tokens" in caught.value.hint
    with pytest.raises(InputError, match="dimension 2 is 5") as caught:
        choose([profile], {"pixel_values": (1, 3, 5, 4)}, {}, "")
    assert "no flag" in caught.value.hint


# --- memory ---


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 9)), max_size=60))
def test_memory_in_use_is_nobody_elses(steps: list[tuple[int, int]]) -> None:
    cuda = HostCuda()
    pool, held = Pool(cuda.allocate, cuda.free), list[Block]()
    for size_bytes, release in steps:
        block = pool.take(size_bytes)
        assert block.size_bytes >= max(1, size_bytes)
        cuda.check(block.address, block.size_bytes)
        spans = sorted((b.address, b.address + b.size_bytes) for b in [*held, block])
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        held.append(block)
        del block, held[: max(0, release - 5)]
    held.clear()
    del pool
    assert cuda.memory == {}


def test_memory_that_came_back_is_used_again() -> None:
    cuda = HostCuda()
    pool = Pool(cuda.allocate, cuda.free)
    for _ in range(50):
        pool.take(1000)
        pool.scratch(500)
    assert cuda.allocations == 2
    small = pool.take(1000)
    large = pool.take(100_000)  # not at the cost of what is in use
    assert small.address != large.address
    del small
    assert pool.take(10).size_bytes < 1000, "a crumb takes no large piece"


def test_bfloat16_rounds_as_the_reference_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    edges = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38], np.float32)
    values = np.concatenate((bits.view(np.float32), edges))
    with np.errstate(invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    real = ~np.isnan(values)
    ours = bfloat16.to_bits(values)
    assert (ours[real] == expected.view(np.uint16)[real]).all()
    assert np.isnan(bfloat16.from_bits(ours[~real])).all()
    assert (bfloat16.from_bits(ours)[real] == expected.astype(np.float32)[real]).all()


# --- the embedding table ---


def test_the_table_says_what_the_graph_says(engine_fp16: Path, artifact_fp16: Path) -> None:
    manifest = EngineManifest.load(engine_fp16)
    table = open_session(engine_fp16 / manifest.embeddings)
    graph = open_session(artifact_fp16 / manifest.artifact.graphs.embed_tokens)
    ids = np.random.default_rng(0).integers(0, manifest.artifact.model.vocab, (3, 7))
    for given_ids in (ids, ids[:, :0]):
        (mine,), (theirs,) = (
            session.run({"input_ids": given_ids}).values() for session in (table, graph)
        )
        np.testing.assert_array_equal(mine, theirs)
        assert np.asarray(mine).dtype == np.float16
    assert table.inputs.keys() == graph.inputs.keys()
    assert table.outputs.keys() == graph.outputs.keys()
    assert table.outputs["inputs_embeds"].dtype == graph.outputs["inputs_embeds"].dtype


def test_a_table_of_bfloat16_is_its_bits(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 4)).astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "t.npy", values.view(np.uint16))
    table = EmbeddingTable(tmp_path / "t.npy")
    assert table.outputs["inputs_embeds"].dtype == "bfloat16"
    found = table.run({"input_ids": np.array([[4, 0]])})["inputs_embeds"]
    assert np.asarray(found).dtype == np.float32
    assert (np.asarray(found) == values[[[4, 0]]].astype(np.float32)).all()


@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_id_beyond_the_table_is_refused(tmp_path: Path, wrong: int) -> None:
    np.save(tmp_path / "t.npy", np.zeros((5, 4), np.float16))
    with pytest.raises(InputError, match="no token"):
        EmbeddingTable(tmp_path / "t.npy").run({"input_ids": np.array([[0, wrong]])})


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", np.zeros(4), np.array([[{}]], object)], ids=["empty", "cut", "1d", "pickle"]
)  # fmt: skip
def test_what_is_no_table_is_refused(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "t.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content, allow_pickle=True)
    with pytest.raises(EngineError, match="no embedding table"):
        EmbeddingTable(file)


# --- an engine answers as its artifact does ---


@pytest.fixture(scope="module")
def artifact(artifact_fp16: Path) -> Artifact:
    return Artifact.load(artifact_fp16, threads=1)


@pytest.fixture
def simulation(
    engine_fp16: Path, artifact_fp16: Path, monkeypatch: pytest.MonkeyPatch
) -> Simulation:
    return simulated(engine_fp16, artifact_fp16, monkeypatch, rows=3)


@pytest.mark.parametrize("images", [0, 1])
def test_answers_are_the_artifacts(
    simulation: Simulation, engine_fp16: Path, artifact: Artifact, images: int
) -> None:
    given_images = [picture(seed) for seed in range(images)]
    mine, theirs = (
        each.generate(given_images, QUESTION, max_new_tokens=12)
        for each in (Artifact.load(engine_fp16), artifact)
    )
    assert mine.token_ids == theirs.token_ids
    assert mine.text == theirs.text
    assert [kept.tolist() for kept in mine.kept] == [kept.tolist() for kept in theirs.kept]


def test_a_batch_and_a_conversation_are_the_artifacts(
    simulation: Simulation, engine_fp16: Path, artifact: Artifact
) -> None:
    loaded = Artifact.load(engine_fp16)
    requests = [Request(QUESTION, [picture(0)]), Request("how many ?"), Request("?", [picture(1)])]
    mine, theirs = (
        each.generate_batch(requests, Options(max_new_tokens=6)) for each in (loaded, artifact)
    )
    assert [answer.token_ids for answer in mine] == [answer.token_ids for answer in theirs]
    talks = Conversation(loaded), Conversation(artifact)
    for question, images in ((QUESTION, [picture(2)]), ("which digit ?", []), ("?", [picture(3)])):
        mine_now, theirs_now = (talk.ask(question, images, max_new_tokens=5) for talk in talks)
        assert mine_now.token_ids == theirs_now.token_ids
    with pytest.raises(InputError, match="outside of the engine's profile"):
        talks[0].ask("digit " * 600)
    mine_now, theirs_now = (talk.ask("and now ?", max_new_tokens=5) for talk in talks)
    assert mine_now.token_ids == theirs_now.token_ids, "a turn that failed left the cache alone"


def test_the_cache_stays_on_the_device_and_memory_is_used_again(
    simulation: Simulation, engine_fp16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, moved, allocated = simulation.cuda, list[int](), list[int]()
    decoder = Artifact.load(engine_fp16).model.decoder
    upload, download = cuda.upload, cuda.download

    def counted(copy: Callable[..., None], array: np.ndarray, *arguments: Any) -> None:
        moved[-1] += array.nbytes
        copy(*arguments)

    monkeypatch.setattr(cuda, "upload", lambda a, p: counted(upload, a, a, p))
    monkeypatch.setattr(cuda, "download", lambda p, a: counted(download, a, p, a))
    step = decoder.empty(1)
    for number in range(200):
        length = 20 if number == 0 else 1
        embeds = np.ones((1, length, 64), np.float16)
        moved.append(0)
        mask, index = np.ones((1, length), np.int64), np.zeros((1, 0), np.int64)
        step = decoder(step, embeds, mask, index).cache
        allocated.append(cuda.allocations)
    assert all(isinstance(value, Resident) for value in step.values.values())
    cache_bytes = sum(2 * int(np.prod(value.shape)) for value in step.values.values())
    assert max(moved[1:]) < cache_bytes / 4  # logits, one token and the mask
    growths = math.ceil(math.log(219 / 70) / math.log(5 / 4))  # a quarter each, from 70 tokens on
    assert allocated[-1] - allocated[50] <= 2 * len(step.values) * growths


def test_prompts_run_in_one_context_and_tokens_in_the_other(
    simulation: Simulation, engine_fp16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Artifact.load(engine_fp16)
    assert len(simulation.engines) == 2, "weights are there once"
    answer = loaded.generate([picture(0)], QUESTION, max_new_tokens=5)
    contexts = loaded.model.decoder.session._contexts  # type: ignore[attr-defined]
    assert [context.runs for context in contexts] == [1, answer.timings.steps]
    assert [context.profile for context in contexts] == [0, 1]
    strategy = "dynamic_shapes_kernel_specialization_strategy"
    assert [getattr(context.config, strategy, "") for context in contexts] == ["", "none"]
    assert loaded.device == "cuda"


def test_a_plan_that_tensorrt_refuses_says_why(simulation: Simulation, engine_fp16: Path) -> None:
    simulation.known.clear()
    with pytest.raises(EngineError, match="does not take the plan: Magic tag"):
        Artifact.load(engine_fp16)


GRAPH = """
<ir_version: 10, opset_import: ["": 21]>
g (bfloat16[N, 4] x, int64[1] keep) => (bfloat16[K, 4] head, bfloat16[N, 4] same) {
  zero = Constant <value_ints = [0]> ()
  bits = Cast <to = 1> (x)
  cut = Slice (bits, zero, keep, zero)
  head = Cast <to = 16> (cut)
  same = Identity (x)
}
"""


@pytest.fixture
def small(tmp_path: Path) -> TensorRT:
    """A session whose number of rows is the value of an input, in bfloat16."""
    simulation, file = Simulation(), tmp_path / "small.plan"
    file.write_bytes(b"small")
    graph = onnx.parser.parse_model(GRAPH).SerializeToString()
    bounds = {"x": ((1, 4), (9, 4)), "keep": ((0,), (5,))}
    simulation.serve(b"small", graph, [bounds], ["keep"])
    gpu = Gpu.of(simulation.library(), simulation.cuda)  # type: ignore[arg-type]
    plan = Plan.open(file, next(iter(simulation.known)))
    return TensorRT(file, data=plan.data, gpu=gpu)


def test_a_shape_input_stays_on_the_host_and_decides_shapes(small: TensorRT) -> None:
    x = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    for keep in (3, 0, 5):
        found = small.run({"x": x, "keep": np.array([keep])})
        np.testing.assert_array_equal(np.asarray(found["head"]), rounded[:keep])
        np.testing.assert_array_equal(np.asarray(found["same"]), rounded)
    with pytest.raises(InputError, match="keep: a value is 6, the engine takes 0 to 5"):
        small.run({"x": x, "keep": np.array([6])})
    assert small.inputs["x"].shape == (None, 4)
    assert small.inputs["x"].dtype == "bfloat16"


def test_what_stays_is_fed_back_however_long_it_is_kept(small: TensorRT) -> None:
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    kept = [
        small.run({"x": x + n, "keep": np.array([1])}, ["same"], resident=["same"])["same"]
        for n in range(6)
    ]
    for n, value in enumerate(kept):
        again = small.run({"x": value, "keep": np.array([2])}, ["head"])["head"]
        np.testing.assert_array_equal(np.asarray(again), (x + n)[:2])


# --- nothing of a plan runs before everything fits ---


@pytest.fixture
def copy(engine_fp16: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine_fp16, tmp_path / "engine"))


@pytest.fixture
def reached(
    engine_fp16: Path, artifact_fp16: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Which plans were about to be deserialised; an untouched folder shows that it notices."""
    simulation = simulated(engine_fp16, artifact_fp16, monkeypatch)
    engine.open_engine(engine_fp16)
    assert len([each for each in simulation.reached if each != "plugin"]) == 2
    simulation.reached.clear()
    return simulation.reached


def stopped(folder: Path, reached: list[str]) -> VtrError:
    with pytest.raises((ArtifactError, EngineError)) as caught:
        engine.open_engine(folder)
    assert reached == []
    return caught.value


@contextmanager
def flipped(file: Path, place: int, bit: int) -> Iterator[None]:
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        for content in (byte ^ 1 << bit, byte):
            stream.seek(place)
            stream.write(bytes([content]))
            stream.flush()
            if content != byte:
                yield


@pytest.mark.parametrize("large", [False, True])
def test_no_flipped_bit_and_no_lost_end_is_opened(
    large: bool, copy: Path, reached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files are hashed where they are opened, small ones with the manifest."""
    if large:
        for module in (published, engine):
            monkeypatch.setattr(module, "SMALL_BYTES", 0)
    chance, files = random.Random(0), sorted(f for f in copy.rglob("*") if f.is_file())
    manifest, plans = copy / "manifest.json", sorted(copy.glob("*.plan"))
    for number in range(220):
        file = chance.choice([manifest, *plans, chance.choice(files)])
        if number < 200:
            with flipped(file, chance.randrange(file.stat().st_size), chance.randrange(8)):
                stopped(copy, reached)
            continue
        whole = file.read_bytes()
        os.truncate(file, chance.randrange(len(whole)))
        stopped(copy, reached)
        file.write_bytes(whole)
    engine.open_engine(copy)
    assert len(reached) >= 2


def changed(folder: Path, **update: Any) -> None:
    """A manifest that is whole, and says something else."""
    manifest = EngineManifest.load(folder)
    manifest.model_copy(update=update).save(folder)


def calls_plugin(folder: Path, version: str, sha256: str) -> None:
    manifest = EngineManifest.load(folder)
    engines = tuple(each.model_copy(update={"plugin_layers": 2}) for each in manifest.engines)
    facts = {"version": version, "sha256": sha256}
    data = manifest.model_dump() | {"plugin": facts, "engines": [e.model_dump() for e in engines]}
    EngineManifest.model_validate(data, strict=False).save(folder)


def test_what_does_not_belong_here_is_not_opened(copy: Path, reached: list[str]) -> None:
    manifest = EngineManifest.load(copy)
    kernel = plugin.in_python()
    for update, said in (
        ({"versions": manifest.versions.model_copy(update={"tensorrt": "10.9.0"})}, "10.9.0"),
        ({"sms": (89, 120)}, "built for SM 89, 120, but this GPU is SM 86"),
        ({"format": 2}, "newer"),
        ({"kind": "artifact"}, "artifact"),
        ({"engines": manifest.engines[::-1]}, "vision_encoder, decoder"),
    ):
        changed(copy, **update)
        assert said in stopped(copy, reached).message
        manifest.save(copy)
    for version, sha256 in (("1", "0" * 64), ("7", kernel.sha256)):
        calls_plugin(copy, version, sha256)
        assert "VtrTopKPrune" in stopped(copy, reached).message
        manifest.save(copy)
    (copy / "schedule.yaml").unlink()
    assert "missing" in stopped(copy, reached).message


def test_another_flavour_of_tensorrt_does_not_open_it(
    copy: Path, reached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = engine.load
    monkeypatch.setattr(engine, "load", lambda _: replace(load(""), target="tensorrt"))
    error = stopped(copy, reached)
    assert "built by tensorrt-rtx" in error.message
    assert "vtr build" in error.hint


def test_without_the_plugin_it_was_built_with_nothing_is_opened(
    copy: Path, reached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls_plugin(copy, "1", plugin.in_python().sha256)
    monkeypatch.setattr(plugin, "find", lambda *_, **__: None)
    assert "none is found" in stopped(copy, reached).message


def test_the_plugin_is_there_before_the_plans(copy: Path, reached: list[str]) -> None:
    calls_plugin(copy, "1", plugin.in_python().sha256)
    engine.open_engine(copy)
    assert len(reached) == 3
    assert reached[0] == "plugin"


@pytest.mark.parametrize(
    ("update", "kind", "said"),
    [
        ({"sms": (89, 120)}, EngineError, "not compiled for SM 86"),
        ({"why_it_cannot_run": lambda: "it needs a compiler"}, UnavailableError, "a compiler"),
    ],
)
def test_a_plugin_that_cannot_run_here_is_not_met_by_a_plan(
    update: dict[str, Any],
    kind: type[VtrError],
    said: str,
    copy: Path,
    reached: list[str],
) -> None:
    calls_plugin(copy, "1", plugin.in_python().sha256)
    vars(plugin.find("on", "tensorrt-rtx")).update(update)
    with pytest.raises(kind, match=said) as caught:
        engine.open_engine(copy)
    assert "build-plugin" in caught.value.hint
    assert reached == []


def test_a_plan_is_hashed_as_it_is_mapped(tmp_path: Path) -> None:
    file = tmp_path / "x.plan"
    for content in (b"", b"another plan"):
        file.write_bytes(content)
        with pytest.raises(EngineError, match=r"x\.plan"):
            Plan.open(file, "0" * 64)
    with pytest.raises(EngineError, match="cannot be read"):
        Plan.open(tmp_path / "gone.plan", "0" * 64)


# --- on the command line, without a GPU ---


@without_gpu
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["run", "--prompt", "hi", "--no-image"], "no NVIDIA"),
        (["bench"], "no NVIDIA"),
        (["bench", "--threads", "2"], "takes no threads"),
        (["run", "--prompt", "hi", "--no-image", "--device", "cpu"], "takes no --device cpu"),
        (["inspect", "--layer", "1"], "layers of a plan"),
    ],
)
def test_what_cannot_run_here_says_so(command: list[str], said: str, engine_fp16: Path) -> None:
    name, *options = command
    done = vtr(name, engine_fp16, *options, "--json")
    assert done.code == 2
    assert said in done.json["error"]["message"]
    assert "Traceback" not in done.err
    assert done.json["error"]["hint"]


@without_gpu
def test_the_wheels_own_runtime_refuses_a_plan_without_a_driver(
    engine_fp16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not simulated: the folder, TensorRT-RTX and its refusal are real; only ``Cuda`` is not."""
    monkeypatch.setattr(engine, "Cuda", HostCuda)
    with pytest.raises(EngineError, match=r"does not take the plan.*driver version"):
        Artifact.load(engine_fp16)


@without_gpu
def test_a_machine_without_a_gpu_is_told_apart_from_one_without_cuda_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UnavailableError, match="no NVIDIA"):
        Cuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UnavailableError, match="cuda-python") as caught:
        Cuda()
    assert "pip install" in caught.value.hint


def test_inspect_shows_what_an_engine_takes(engine_fp16: Path, artifact_fp16: Path) -> None:
    said = vtr("inspect", engine_fp16, "--json").json
    expected = json.loads(Manifest.load(artifact_fp16).to_json())
    assert said["artifact"].items() <= expected.items()
    assert said["engine"]["sms"] == [86]
    decoder = next(e for e in said["engine"]["engines"] if e["component"] == "decoder")
    assert [profile["name"] for profile in decoder["profiles"]] == ["context", "generation"]
    text = vtr("inspect", engine_fp16).out
    assert "SM 8.6" in text
    assert "profile 1, generation" in text


def test_run_takes_an_engine(
    simulation: Simulation, engine_fp16: Path, artifact: Artifact, tmp_path: Path
) -> None:
    picture(0).save(tmp_path / "image.png")
    options = ["--image", tmp_path / "image.png", "--prompt", QUESTION, "--max-new-tokens", 6]
    done = vtr("run", engine_fp16, *options)
    assert done.code == 0, done.err
    expected = artifact.generate(picture(0), QUESTION, max_new_tokens=6)
    assert done.out == f"{expected.text}\n"


def test_bench_takes_an_engine(
    simulation: Simulation, engine_fp16: Path, artifact_fp16: Path
) -> None:
    done = vtr("bench", engine_fp16, "--text-tokens", 8, "--new-tokens", 1, "--json")
    assert done.code == 0, done.err
    assert done.json["device"] == "cuda"
    assert done.json["prefill_ms"] > 0
    assert "no vision_index" in done.json["against"]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
def test_a_gpu_answers_as_the_artifact_does(artifact_fp16: Path, tmp_path: Path) -> None:
    from vtr_export.builder import build

    build(artifact_fp16, tmp_path / "engine")
    mine, theirs = (Artifact.load(path) for path in (tmp_path / "engine", artifact_fp16))
    for images in ([], [picture(0)]):
        answers = [each.generate(images, QUESTION, max_new_tokens=8) for each in (mine, theirs)]
        assert answers[0].token_ids == answers[1].token_ids
