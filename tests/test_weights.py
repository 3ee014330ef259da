"""Streamed and linked weights: right bytes, once each, scanned, in little memory."""

import hashlib
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from test_checkpoint import write_shard

from vtr_export import streams, weights
from vtr_export.checkpoint import Checkpoint, TensorRef, read_header
from vtr_export.errors import CheckpointError, VtrError, WeightError
from vtr_export.streams import CHUNK_BYTES, Sink
from vtr_export.weights import ALIGNMENT, CheckpointTensor, link_weights, write_weights

DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}
FLOATS = {"F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "F32": ir.DataType.FLOAT}


def checkpoint(folder: Path, *shards: Mapping[str, np.ndarray]) -> dict[str, TensorRef]:
    """Write ``shards`` as a model folder; the tensors of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    names = {np.dtype(kind): name for name, kind in DTYPES.items()}
    names |= {np.dtype(np.int64): "I64", np.dtype(np.float64): "F64"}
    weight_map = {}
    for number, arrays in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: (names[a.dtype], a.shape, a.tobytes()) for name, a in arrays.items()}
        write_shard(folder / file, tensors)
        weight_map |= dict.fromkeys(arrays, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return Checkpoint.open(folder).tensors


def graph(*tensors: CheckpointTensor | ir.Tensor[Any]) -> ir.Model:
    """A model that returns its initializers."""
    values = [
        ir.Value(name=t.name, const_value=t, shape=t.shape, type=ir.TensorType(t.dtype))
        for t in tensors
    ]
    nodes = [ir.node("Identity", [value]) for value in values]
    outputs = [node.outputs[0] for node in nodes]
    for output, value in zip(outputs, values, strict=True):
        output.name, output.shape, output.type = f"out_{value.name}", value.shape, value.type
    made = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 21}, name="g")
    return ir.Model(made, ir_version=10)


def stored(model: ir.Model, name: str) -> Any:
    return model.graph.initializers[name].const_value


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(("source", "target"), [*itertools.product(DTYPES, DTYPES)])
@pytest.mark.parametrize("transpose", [False, True])
def test_written_bytes_are_what_numpy_says(
    tmp_path: Path, source: str, target: str, transpose: bool
) -> None:
    array = normal(70, 130).astype(DTYPES[source])
    wide = array.astype(np.float32)
    expected = wide.astype(DTYPES[target])
    ref = checkpoint(tmp_path / "model", {"w": array})["w"]
    tensor = CheckpointTensor(ref, name="w", dtype=FLOATS[target], transpose=transpose)
    want = expected.T if transpose else expected
    assert tuple(tensor.shape) == want.shape
    assert tensor.numpy().dtype == want.dtype
    assert tensor.tobytes() == np.ascontiguousarray(want).tobytes()
    model = graph(tensor)
    write_weights({"g": model}, tmp_path)
    assert stored(model, "w").tobytes() == np.ascontiguousarray(want).tobytes()
    np.testing.assert_array_equal(tensor.numpy(), want)


@pytest.mark.parametrize(
    "shape", [(3, 40), (1, 3000), (3000, 1), (257, 4099), (0, 5), (2_200_000, 2)]
)
def test_odd_shapes_are_transposed_right(tmp_path: Path, shape: tuple[int, int]) -> None:
    array = (np.arange(math.prod(shape)) % 30011).astype(np.float16).reshape(shape)
    ref = checkpoint(tmp_path, {"w": array})["w"]
    model = graph(CheckpointTensor(ref, name="w", dtype=FLOATS["F16"], transpose=True))
    write_weights({"g": model}, tmp_path)
    np.testing.assert_array_equal(stored(model, "w").numpy(), array.T)


@pytest.mark.parametrize("shape", [(150, 333), (1, 200), (200, 1), (65, 64), (512, 129)])
def test_many_chunks_and_one_weight_in_several_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    """Chunks of 1000 bytes, so that every loop turns often; one read serves one hash."""
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 1000)
    first, second = normal(*shape).astype(np.float16), normal(*shape, seed=1).astype(np.float16)
    refs = checkpoint(
        tmp_path, {"gap": normal(999), "first": first, "second": second, "rest": normal(999)}
    )
    forms = list(itertools.product(("first", "second"), ("F16", "F32"), (False, True)))
    model = graph(
        *(
            CheckpointTensor(
                refs[name], name=f"{name}{dtype}{turn}", dtype=FLOATS[dtype], transpose=turn
            )
            for name, dtype, turn in forms
        )
    )
    report = write_weights({"g": model}, tmp_path)
    raw = (tmp_path / "model-00001-of-00001.safetensors").read_bytes()
    assert list(report.shards.values()) == [hashlib.sha256(raw).hexdigest()]
    for name, dtype, turn in forms:
        want = {"first": first, "second": second}[name].astype(DTYPES[dtype])
        got = stored(model, f"{name}{dtype}{turn}").numpy()
        np.testing.assert_array_equal(got, want.T if turn else want)


@pytest.mark.parametrize("transpose", [False, True])
def test_the_index_is_right_in_a_late_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transpose: bool
) -> None:
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1000)
    array = normal(150, 333).astype(np.float16)
    array[140, 321] = math.nan
    ref = checkpoint(tmp_path, {"w": array})["w"]
    model = graph(CheckpointTensor(ref, name="w", dtype=FLOATS["F16"], transpose=transpose))
    with pytest.raises(WeightError, match=r"\[140, 321\]"):
        write_weights({"g": model}, tmp_path)


def test_files_hashes_order_and_alignment(tmp_path: Path) -> None:
    first = {
        "b": normal(100, 50).astype(np.float16),
        "small": normal(8).astype(np.float16),
        "unused": normal(9999),
    }
    second = {
        "a": normal(3000).astype(np.float32),
        "n": np.arange(500),
        "scalar": np.array(2.5, np.float32),
    }
    refs = checkpoint(tmp_path / "model", first, second)
    sources = {"b": "F16", "small": "F16", "a": "F32", "scalar": "F32"}
    tensors = [CheckpointTensor(refs[n], name=n, dtype=FLOATS[d]) for n, d in sources.items()]
    integers = CheckpointTensor(refs["n"], name="n", dtype=ir.DataType.INT64)
    out = tmp_path / "onnx"
    out.mkdir()
    one, two = graph(tensors[2], tensors[3]), graph(integers, tensors[0], tensors[1])
    seen: list[tuple[int, int]] = []
    report = write_weights({"one": one, "two": two}, out, progress=lambda *now: seen.append(now))
    assert (
        set(report.files)
        == {file.name for file in out.iterdir()}
        == {"one.onnx.data", "two.onnx.data"}
    )
    for name, file in report.files.items():
        raw = (out / name).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert report.shards == {s.name: hashlib.sha256(s.read_bytes()).hexdigest() for s in shards}
    assert report.weights_scanned
    assert report.tensors == 5
    total = sum(shard.stat().st_size for shard in shards)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert all(stored(two, name).offset % ALIGNMENT == 0 for name in ("b", "n"))
    for model, names in ((one, ("a", "scalar")), (two, ("b", "small", "n"))):
        for name in names:
            np.testing.assert_array_equal(stored(model, name).numpy(), (first | second)[name])
    assert isinstance(stored(two, "small"), ir.Tensor)
    again = tmp_path / "again"
    again.mkdir()
    tensors = [CheckpointTensor(refs[n], name=n, dtype=FLOATS[d]) for n, d in sources.items()]
    integers = CheckpointTensor(refs["n"], name="n", dtype=ir.DataType.INT64)
    repeat = {"one": graph(tensors[2], tensors[3]), "two": graph(integers, tensors[0], tensors[1])}
    assert write_weights(repeat, again).files == report.files


def test_onnx_runtime_reads_what_was_written_and_shared(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="extra [cpu] is not installed")
    embed, head = normal(64, 32).astype(np.float16), normal(64, 48, seed=1).astype(np.float16)
    refs = checkpoint(tmp_path / "model", {"embed": embed, "head": head})
    tied = [CheckpointTensor(refs["embed"], name=n, dtype=FLOATS["F32"]) for n in ("x", "y", "z")]
    turned = CheckpointTensor(refs["head"], name="h", dtype=FLOATS["F32"], transpose=True)
    models = {"embed_tokens": graph(tied[0]), "decoder": graph(tied[1], tied[2], turned)}
    report = write_weights(models, tmp_path)
    assert report.tensors == 2
    assert {name: file.size_bytes for name, file in report.files.items()} == {
        "embed_tokens.onnx.data": 4 * embed.size,
        "decoder.onnx.data": 4 * head.size,
    }
    assert stored(models["decoder"], "y").location == "embed_tokens.onnx.data"
    assert stored(models["decoder"], "z").offset == stored(models["embed_tokens"], "x").offset
    for name, model in models.items():
        ir.save(model, tmp_path / f"{name}.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "decoder.onnx", providers=["CPUExecutionProvider"]
    )
    for got, want in zip(session.run(None, {}), (embed, embed, head.T), strict=True):
        np.testing.assert_array_equal(got, want.astype(np.float32))


def test_linked_weights_point_into_the_shards(tmp_path: Path) -> None:
    array, other = normal(16, 8).astype(np.float16), normal(7).astype(np.float32)
    refs = checkpoint(tmp_path, {"w": array}, {"b": other})
    model = graph(
        CheckpointTensor(refs["w"], name="w", dtype=FLOATS["F16"]),
        CheckpointTensor(refs["b"], name="b", dtype=FLOATS["F32"]),
    )
    before = sorted(tmp_path.iterdir())
    report = link_weights({"g": model}, tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert not report.weights_scanned
    assert not report.files
    assert report.shards == {
        f.name: read_header(f)[1] for f in sorted(tmp_path.glob("*.safetensors"))
    }
    assert Path(stored(model, "w").location) == Path(refs["w"].shard.name)
    np.testing.assert_array_equal(stored(model, "w").numpy(), array)
    np.testing.assert_array_equal(stored(model, "b").numpy(), other)


def test_what_cannot_be_linked_is_refused_and_the_graph_left_alone(tmp_path: Path) -> None:
    here = checkpoint(tmp_path / "here", {"w": normal(4, 4).astype(np.float16), "d": normal(4)})
    there = checkpoint(tmp_path / "there", {"w": normal(4, 4).astype(np.float16)})
    good = CheckpointTensor(here["w"], name="w", dtype=FLOATS["F16"])
    away = CheckpointTensor(there["w"], name="v", dtype=FLOATS["F16"])
    double = CheckpointTensor(here["d"], name="d", dtype=ir.DataType.DOUBLE)
    for bad, word in ((away, "outside"), (double, "F64")):
        model = graph(good, bad)
        with pytest.raises(CheckpointError, match=word):
            link_weights({"g": model}, tmp_path / "here")
        assert stored(model, "w") is good
    for wish in ({"dtype": FLOATS["F32"]}, {"dtype": FLOATS["F16"], "transpose": True}):
        with pytest.raises(ValueError, match="neither cast nor transposed"):
            link_weights(
                {"g": graph(CheckpointTensor(here["w"], name="w", **wish))}, tmp_path / "here"
            )


def test_dtypes_without_a_place_in_a_graph_are_refused(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "s.safetensors", {"q": ("F8_E4M3", (4,), bytes(4)), "n": ("I64", (1,), bytes(8))}
    )
    refs, _ = read_header(tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        CheckpointTensor(refs["q"], name="q", dtype=FLOATS["F16"])
    with pytest.raises(ValueError, match="no cast"):
        CheckpointTensor(refs["n"], name="n", dtype=FLOATS["F16"])
    with pytest.raises(ValueError, match="matrices"):
        CheckpointTensor(refs["n"], name="n", dtype=ir.DataType.INT64, transpose=True)


def planted() -> list[tuple[str, str, float, str]]:
    """20 weights nobody should export: source, target, value, what the error calls it."""
    cases = []
    for source in DTYPES:
        for value, word in (
            (math.nan, "nan"),
            (math.inf, "inf"),
            (-math.inf, "-inf"),
            (-math.nan, "nan"),
        ):
            cases.append((source, source, value, word))
    for value in (65520.0, -65536.0, 3e38):
        cases += [("F32", "F16", value, "beyond"), ("BF16", "F16", value, "beyond")]
    return [*cases, ("F32", "BF16", 3.4e38, "beyond"), ("F32", "BF16", -3.4e38, "beyond")]


@pytest.mark.parametrize(("source", "target", "value", "word"), planted())
@pytest.mark.parametrize("transpose", [False, True])
def test_planted_overflow_and_nan_are_named(
    tmp_path: Path, source: str, target: str, value: float, word: str, transpose: bool
) -> None:
    clean = normal(90, 60).astype(DTYPES[source])
    bad = clean.copy()
    bad[77, 31] = value
    bad[80, 2] = math.nan
    refs = checkpoint(tmp_path, {"clean": clean, "layers.1.bad": bad, "late": bad})
    tensors = [
        CheckpointTensor(ref, name=name, dtype=FLOATS[target], transpose=transpose)
        for name, ref in refs.items()
    ]
    model = graph(*reversed(tensors))
    with pytest.raises(WeightError) as caught:
        write_weights({"g": model}, tmp_path)
    text = str(caught.value)
    assert all(part in text for part in ("VTR003", "'layers.1.bad'", "[77, 31]", word)), text
    assert stored(model, "clean") is tensors[0]


@pytest.mark.parametrize(("source", "target"), [*itertools.product(DTYPES, DTYPES)])
def test_the_largest_values_that_fit_raise_no_alarm(
    tmp_path: Path, source: str, target: str
) -> None:
    """Ten clean models: extremes, zeros of both signs, subnormals."""
    top = min(float(ml_dtypes.finfo(DTYPES[d]).max) for d in (source, target))
    top = 65280.0 if (source, target) == ("BF16", "F16") else top  # the last before 65536
    tiny = float(ml_dtypes.finfo(DTYPES[source]).smallest_subnormal)
    values = np.resize(np.array([top, -top, 0.0, -0.0, tiny, -tiny, 1.0, -1.0]), 1024)
    if (source, target) == ("F32", "F16"):
        values[3] = np.nextafter(np.float32(65520), np.float32(0))
    refs = checkpoint(tmp_path, {"w": values.astype(DTYPES[source])})
    model = graph(CheckpointTensor(refs["w"], name="w", dtype=FLOATS[target]))
    write_weights({"g": model}, tmp_path)
    assert np.isfinite(stored(model, "w").numpy().astype(np.float32)).all()


def test_all_float16_patterns_are_judged_as_isfinite_does(tmp_path: Path) -> None:
    for pattern in (*range(0x7BF0, 0x7C10), *range(0xFBF0, 0xFC10), 0x7FFF, 0xFFFF):
        value = np.array([pattern] * 2, np.uint16).view(np.float16)
        refs = checkpoint(tmp_path, {"w": value})
        model = graph(CheckpointTensor(refs["w"], name="w", dtype=FLOATS["F16"]))
        try:
            write_weights({"g": model}, tmp_path)
            found = False
        except WeightError:
            found = True
        assert found != np.isfinite(value[0]), hex(pattern)


def test_a_bit_flip_in_a_hub_cache_is_found_by_its_name(tmp_path: Path) -> None:
    array = normal(64, 64).astype(np.float16)
    checkpoint(tmp_path / "plain", {"w": array})
    source = next((tmp_path / "plain").glob("*.safetensors"))
    raw = bytearray(source.read_bytes())
    blob = tmp_path / "blobs" / hashlib.sha256(raw).hexdigest()
    blob.parent.mkdir()
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    generator = np.random.default_rng(0)
    data_start = len(raw) - array.nbytes
    for flip in range(21):
        damaged = bytearray(raw)
        if flip:
            damaged[generator.integers(data_start, len(raw))] ^= 1 << int(generator.integers(8))
        blob.write_bytes(damaged)
        ref = read_header(link)[0]["w"]
        models = {"g": graph(CheckpointTensor(ref, name="w", dtype=FLOATS["F16"]))}
        if not flip:
            write_weights(models, tmp_path)
            continue
        with pytest.raises(VtrError) as caught:
            write_weights(models, tmp_path)
        assert "model.safetensors" in str(caught.value)


def test_a_shard_that_shrinks_or_vanishes_after_opening_is_named(tmp_path: Path) -> None:
    ref = checkpoint(tmp_path, {"w": normal(64, 64).astype(np.float16)})["w"]
    tensor = CheckpointTensor(ref, name="w", dtype=FLOATS["F16"])
    with ref.shard.open("r+b") as file:
        file.truncate(ref.offset + 100)
    for read in (tensor.numpy, lambda: write_weights({"g": graph(tensor)}, tmp_path)):
        with pytest.raises(CheckpointError, match="ends early"):
            read()
    ref.shard.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        tensor.numpy()


def test_parts_of_a_sink_must_not_run_past_its_size(tmp_path: Path) -> None:
    with Sink(tmp_path / "x", 10) as sink:
        sink.write(np.arange(2, dtype=np.uint8), 0)
        sink.write(np.arange(2, dtype=np.uint8), 8)
    raw = bytes([0, 1, 0, 0, 0, 0, 0, 0, 0, 1])
    assert (tmp_path / "x").read_bytes() == raw
    assert sink.hash.hexdigest() == hashlib.sha256(raw).hexdigest()


MEMORY = """
import resource, sys
from pathlib import Path
import onnx_ir as ir
from test_weights import graph
from vtr_export.checkpoint import Checkpoint
from vtr_export.weights import CheckpointTensor, write_weights
folder = Path(sys.argv[1])
tensors = Checkpoint.open(folder).tensors
model = graph(*(CheckpointTensor(r, name=n, dtype=ir.DataType.FLOAT16, transpose=True) for n, r in tensors.items()))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_weights({"g": model}, folder)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_stays_within_two_tensors(tmp_path: Path) -> None:
    """A sparse checkpoint of 10 matrices: bigger than what may be held, free to make."""
    rows, columns, count = 2048, 4096, 10
    size_bytes = 2 * rows * columns
    header = {
        f"w{i}": {
            "dtype": "BF16",
            "shape": [rows, columns],
            "data_offsets": [i * size_bytes, (i + 1) * size_bytes],
        }
        for i in range(count)
    }
    raw = json.dumps(header).encode()
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + count * size_bytes)
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert grown <= 2 * size_bytes + (200 << 20)
    assert grown < count * size_bytes
    assert size_bytes > CHUNK_BYTES
