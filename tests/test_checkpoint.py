"""Model folders are opened by their headers, and everything damaged is refused by name."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtr_export.checkpoint import Checkpoint
from vtr_export.errors import CheckpointError

Header = dict[str, Any]


def write_shard(file: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> Header:
    header: Header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        extent = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": extent}
        data += raw
    write_raw(file, header, data)
    return header


def write_raw(file: Path, header: Header | bytes, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def f32(*shape: int) -> tuple[str, tuple[int, ...], bytes]:
    return "F32", shape, np.arange(np.prod(shape), dtype=np.float32).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded model of three tensors in two files."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava"}')
    write_shard(folder / "model-1.safetensors", {"a": f32(2, 3), "b": f32(4)})
    write_shard(folder / "model-2.safetensors", {"c": f32(5, 1)})
    weight_map = {
        "a": "model-1.safetensors",
        "b": "model-1.safetensors",
        "c": "model-2.safetensors",
    }
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def single(folder: Path) -> Path:
    for file in folder.glob("model*"):
        file.unlink()
    return folder / "model.safetensors"


def refused(folder: Path | str, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    text = str(caught.value)
    assert all(word in text for word in ("VTR002", "help:", *words)), text


def read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    ref = checkpoint.tensors[name]
    raw = ref.shard.read_bytes()[ref.offset : ref.offset + ref.size_bytes]
    return np.frombuffer(raw, np.float32).reshape(ref.shape)


def test_shards_are_found_and_tensors_lie_where_the_refs_say(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config == {"model_type": "llava"}
    assert [shard.name for shard in checkpoint.shards] == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]
    assert set(checkpoint.headers_sha256) == {"model-1.safetensors", "model-2.safetensors"}
    for name, shape in {"a": (2, 3), "b": (4,), "c": (5, 1)}.items():
        assert checkpoint.tensors[name].dtype == "F32"
        np.testing.assert_array_equal(
            read(checkpoint, name), np.arange(np.prod(shape)).reshape(shape)
        )


def test_the_safetensors_library_reads_the_same(folder: Path) -> None:
    library = pytest.importorskip("safetensors.numpy", reason="extra [export] is not installed")
    file = single(folder)
    arrays = {
        "x": np.ones((3, 5), np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "s": np.array(7, np.float32),
    }
    library.save_file(arrays, file)
    checkpoint = Checkpoint.open(str(folder))
    assert {name: ref.shape for name, ref in checkpoint.tensors.items()} == {
        "x": (3, 5),
        "empty": (0, 4),
        "s": (),
    }
    assert checkpoint.tensors["x"].size_bytes == 30


def test_a_hub_cache_is_found_by_id_without_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--org--name"
    snapshot = cache / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = file.rename(cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123\n")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    checkpoint = Checkpoint.open("org/name")
    assert checkpoint.folder == snapshot
    assert read(checkpoint, "c").tolist() == [[0], [1], [2], [3], [4]]
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert Checkpoint.open("org/name").folder == snapshot
    refused("org/other", "hf download org/other")
    (cache / "blobs" / "1").unlink()
    refused("org/name", "missing")
    (cache / "refs" / "main").write_text("../../evil")
    refused("org/name", "snapshot")


def test_not_a_model_folder(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such")
    refused("../absent/model", "no such")
    refused(folder / "config.json", "is a file")
    (folder / "config.json").unlink()
    refused(folder, "config.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1, "a": 2}', "[" * 100_000, "\udcff"])
def test_a_broken_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(folder, "config.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused(folder: Path, name: str) -> None:
    single(folder)
    (folder / name).write_bytes(b"\x80\x02")
    refused(folder, name, "save_pretrained")


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_alone_is_refused(folder: Path, with_config: bool) -> None:
    single(folder)
    if not with_config:
        (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    write_shard(folder / "adapter_model.safetensors", {"lora": f32(1)})
    refused(folder, "adapter", "merge")


def test_no_weights_and_no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, "index.json", "model-1.safetensors")
    single(folder)
    refused(folder, "no weights")


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model-2.safetensors").unlink()
    refused(folder, "model-2.safetensors", "missing")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "..", "", 3, None, "a/b"])
def test_an_index_cannot_lead_out_of_the_folder(folder: Path, shard: Any) -> None:
    write_index(folder, {"a": shard})
    refused(folder, "index.json", "no file name")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map(folder: Path, weight_map: Any) -> None:
    write_index(folder, weight_map)
    refused(folder, "weight_map")


def test_a_tensor_of_the_index_that_its_shard_lacks(folder: Path) -> None:
    write_index(folder, {"a": "model-2.safetensors", "c": "model-2.safetensors"})
    refused(folder, "'a'", "model-2.safetensors")


def test_truncation_is_found_at_every_length(folder: Path) -> None:
    file = single(folder)
    write_shard(file, {"a": f32(2, 3), "b": f32(4)})
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        refused(folder, "model.safetensors")
    file.write_bytes(whole + b"\0")
    refused(folder, "after the last tensor")


def entry(dtype: Any, shape: Any, *extent: Any) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(extent)}


BROKEN: dict[str, Header | bytes] = {
    "overlap": {"a": entry("F32", [4], 0, 16), "b": entry("F32", [4], 8, 24)},
    "hole": {"a": entry("F32", [2], 0, 8), "b": entry("F32", [4], 16, 32)},
    "negative": {"a": entry("F32", [4], -16, 0)},
    "reversed": {"a": entry("F32", [4], 16, 0)},
    "size": {"a": entry("F16", [4], 0, 32)},
    "beyond": {"a": entry("F32", [1 << 40], 0, 1 << 42)},
    "dtype": {"a": entry("F31", [8], 0, 32)},
    "float shape": {"a": entry("F32", [8.0], 0, 32)},
    "bool shape": {"a": entry("F32", [True, 8], 0, 32)},
    "negative shape": {"a": entry("F32", [-2, -4], 0, 32)},
    "three offsets": {"a": entry("F32", [8], 0, 16, 32)},
    "not a dict": {"a": [1, 2]},
    "extra key": {"a": {**entry("F32", [8], 0, 32), "x": 1}},
    "no key": {"a": {"dtype": "F32"}},
    "list": b"[]",
    "not JSON": b"{'a': 1}",
    "twice": b'{"a": {"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a": {"dtype":"F32","shape":[4],"data_offsets":[16,32]}}',
    "deep": b'{"a":' * 50_000,
    "not utf-8": b'{"\xff": 1}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_corrupt_header_is_refused(folder: Path, name: str) -> None:
    file = single(folder)
    write_raw(file, BROKEN[name], bytes(32))
    refused(folder, "model.safetensors")


LENGTHS: list[Callable[[int], int]] = [
    lambda n: 0,
    lambda n: n + 1,
    lambda n: n - 1,
    lambda n: 1 << 63,
    lambda n: 200_000_000,
]


@pytest.mark.parametrize("change", LENGTHS)
def test_a_wrong_header_length_is_refused(folder: Path, change: Callable[[int], int]) -> None:
    file = single(folder)
    write_shard(file, {"a": f32(2, 3)})
    raw = file.read_bytes()
    length = change(int.from_bytes(raw[:8], "little"))
    file.write_bytes(struct.pack("<Q", length) + raw[8:])
    refused(folder, "model.safetensors")
