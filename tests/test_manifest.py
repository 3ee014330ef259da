"""A manifest says what an artifact is, and every damage to one is found."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_checkpoint import f32, write_shard

from vtr_export.checkpoint import read_header
from vtr_export.errors import ArtifactError
from vtr_export.manifest import Manifest
from vtr_export.published import MANIFEST, SMALL_BYTES, File, hash_files

GRAPHS = {name: f"onnx/{name}.onnx" for name in ("vision_encoder", "embed_tokens", "decoder")}


def facts(**changes: Any) -> dict[str, Any]:
    """A manifest as plain data, without files."""
    data: dict[str, Any] = {
        "format": 1,
        "versions": {"vtr_export": "0.1.0", "opset": 24},
        "source": {"model": "llava", "config_sha256": "0" * 64, "shards": {"model.safetensors": "1" * 64}},
        "dtype": "fp16",
        "weights": {"mode": "copy"},
        "weights_scanned": True,
        "schedule": {"text": "version: 1\n", "keep_per_layer": [16, 16, 8, 8]},
        "model": {
            "model_type": "llava", "layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8,
            "vocab": 64, "context": 1024, "image_token_id": 4, "tokens_per_image": 16, "eos_token_ids": [2],
            "stages": [{"first_layer": 0}, {"first_layer": 2, "keep": {"numerator": 8, "denominator": 16}}],
        },
        "graphs": GRAPHS,
        "gates": [{"name": "prefill cosine", "passed": True, "measured": 0.99999999, "bar": 0.99999}],
        "verified": True,
        "scope": "all",
        "timings": {"trace": 4.25},
        "peak_rss_bytes": 1 << 29,
        "files": {path: {"bytes": 0, "sha256": "2" * 64} for path in GRAPHS.values()},
    }  # fmt: skip
    return data | changes


def manifest(**changes: Any) -> Manifest:
    return Manifest.model_validate_json(json.dumps(facts(**changes)))


def artifact(folder: Path, **changes: Any) -> Manifest:
    """A small whole artifact: three graphs, a weight file, a manifest."""
    (folder / "onnx").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for path in GRAPHS.values():
        (folder / path).write_bytes(generator.bytes(200))
    (folder / "onnx" / "decoder.onnx.data").write_bytes(generator.bytes(5000))
    files = {name: file.model_dump() for name, file in hash_files(folder).items()}
    made = manifest(files=files, **changes)
    made.save(folder)
    return made


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        Manifest.load(folder)
    text = str(caught.value)
    assert all(word in text for word in ("VTR201", "help:", *words)), text


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    made = artifact(tmp_path)
    assert Manifest.load(tmp_path) == made
    assert Manifest.load(str(tmp_path)) == made
    assert sorted(made.files) == sorted([*GRAPHS.values(), "onnx/decoder.onnx.data"])
    assert [file.name for file in tmp_path.glob("manifest*")] == [MANIFEST]


def test_an_artifact_is_usable_through_a_symlinked_folder(tmp_path: Path) -> None:
    made = artifact(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert Manifest.load(tmp_path / "link") == made


def test_the_text_is_deterministic(tmp_path: Path) -> None:
    data = facts()
    turned = dict(reversed(data.items()))
    texts = {Manifest.model_validate_json(json.dumps(d)).to_json() for d in (data, turned)}
    assert len(texts) == 1
    text = texts.pop()
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert Manifest.model_validate_json(text).to_json() == text


def test_no_artifact(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such")
    refused(tmp_path, "not an artifact")
    (tmp_path / MANIFEST).write_text("{}")
    refused(tmp_path, "malformed", "files")
    (tmp_path / MANIFEST).write_text('{"kind": "engine"}')
    refused(tmp_path, "holds an engine, not an artifact")
    for text in ("", "[]", "{", "[" * 100_000, "\x00"):
        (tmp_path / MANIFEST).write_text(text)
        refused(tmp_path, "manifest.json")
    (tmp_path / MANIFEST).write_bytes(b"\xff")
    refused(tmp_path, "JSON")
    (tmp_path / MANIFEST).write_text(json.dumps(facts(format=2, surprise=1)))
    refused(tmp_path, "newer", "format 2", "upgrade")


BROKEN: dict[str, dict[str, Any]] = {
    "extra": {"extra": 1},
    "format": {"format": 0},
    "dtype": {"dtype": "int4"},
    "coerced": {"weights_scanned": "yes"},
    "link without folder": {"weights": {"mode": "link"}},
    "link to a relative folder": {"weights": {"mode": "link", "folder": "x"}},
    "copy with a folder": {"weights": {"mode": "copy", "folder": "/x"}},
    "shard elsewhere": {
        "source": {"model": "m", "config_sha256": "0" * 64, "shards": {"../m": "0" * 64}}
    },
    "hash": {"files": {"a": {"bytes": 0, "sha256": "xyz"}}},
    "size": {"files": {"a": {"bytes": -1, "sha256": "0" * 64}}},
    "graph not listed": {"files": {}},
    "own name": {"files": facts()["files"] | {MANIFEST: {"bytes": 0, "sha256": "0" * 64}}},
    "verified without gates": {"gates": []},
    "verified in vain": {"gates": [{"name": "x", "passed": False, "measured": 0.0, "bar": 1.0}]},
    "verified nothing": {"scope": "none"},
    "scope": {"scope": "layers:0"},
    "nan": {"timings": {"x": float("nan")}},
    "stage order": {"model": facts()["model"] | {"stages": [{"first_layer": 1}]}},
    "stage keep": {
        "model": facts()["model"] | {"stages": [{"first_layer": 0}, {"first_layer": 1}]}
    },
    "keeps": {"schedule": {"text": "", "keep_per_layer": [1]}},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_manifest_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(facts(**BROKEN[name])))
    refused(tmp_path, "malformed")


def test_a_cut_before_layer_0_leaves_the_first_stage_empty() -> None:
    keep = {"numerator": 8, "denominator": 16}
    stages = [{"first_layer": 0}, {"first_layer": 0, "keep": keep}]
    assert manifest(model=facts()["model"] | {"stages": stages}).model.stages[1].first_layer == 0


ESCAPES = [
    "/etc/passwd", "../x", "a/../../x", "..", ".", "", "a//b", "./a", "a/", "a\\..\\..\\x", "C:x", "C:/x",
    "\\\\host\\x", "a\0b", "a\nb", "a/./b", "file:x", "~/../x",
]  # fmt: skip


@pytest.mark.parametrize("path", ESCAPES)
@pytest.mark.parametrize("place", ["files", "graphs"])
def test_no_path_leads_out_of_the_folder(tmp_path: Path, path: str, place: str) -> None:
    data = facts()
    if place == "graphs":
        data["graphs"] = GRAPHS | {"decoder": path}
    data["files"][path] = {"bytes": 0, "sha256": "0" * 64}
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    refused(tmp_path, "malformed", "path")


@pytest.mark.parametrize("folder_too", [False, True])
def test_no_symlink_leads_out_of_the_folder(tmp_path: Path, folder_too: bool) -> None:
    home = tmp_path / "artifact"
    artifact(home)
    moved = home / "onnx" if folder_too else home / "onnx" / "decoder.onnx"
    moved.rename(tmp_path / "outside")
    moved.symlink_to(tmp_path / "outside")
    refused(home, "leads out")
    with pytest.raises(ArtifactError, match="symbolic"):
        hash_files(home)


CHANGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "not 201": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "contents": lambda file: file.write_bytes(bytes(200)),
}


@pytest.mark.parametrize("word", CHANGES)
def test_a_changed_file_is_named_at_load(tmp_path: Path, word: str) -> None:
    artifact(tmp_path)
    CHANGES[word](tmp_path / "onnx" / "decoder.onnx")
    refused(tmp_path, "decoder.onnx", "201 bytes, not 200" if word == "not 201" else word)


def test_200_bit_flips_in_weights_are_found(tmp_path: Path) -> None:
    made = artifact(tmp_path)
    file = tmp_path / "onnx" / "decoder.onnx.data"
    whole = file.read_bytes()
    generator = np.random.default_rng(1)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] ^= 1 << int(generator.integers(8))
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"decoder\.onnx\.data|contents"):
            made.check_hashes(tmp_path, full=True)
    file.write_bytes(whole)
    made.check_hashes(tmp_path, full=True)


def test_large_files_are_hashed_when_asked(tmp_path: Path) -> None:
    artifact(tmp_path)
    big = tmp_path / "onnx" / "decoder.onnx.data"
    with big.open("wb") as file:
        file.truncate(SMALL_BYTES + 1)
    files = {name: f.model_dump() for name, f in hash_files(tmp_path).items()}
    made = manifest(files=files)
    made.save(tmp_path)
    with big.open("r+b") as file:
        file.write(b"x")
    Manifest.load(tmp_path)
    with pytest.raises(ArtifactError, match="damaged"):
        made.check_hashes(tmp_path, full=True)


def test_known_hashes_are_not_computed_again(tmp_path: Path) -> None:
    artifact(tmp_path)
    known = {"onnx/decoder.onnx.data": File(bytes=7, sha256="7" * 64)}
    assert hash_files(tmp_path, known)["onnx/decoder.onnx.data"].bytes == 7
    assert MANIFEST not in hash_files(tmp_path)


def test_linked_weights_must_still_be_the_ones_exported(tmp_path: Path) -> None:
    shard = tmp_path / "checkpoint" / "model.safetensors"
    shard.parent.mkdir()
    write_shard(shard, {"a": f32(2, 3)})
    source = {
        "model": "m",
        "config_sha256": "0" * 64,
        "shards": {shard.name: read_header(shard)[1]},
    }
    weights = {"mode": "link", "folder": str(shard.parent)}
    made = artifact(tmp_path / "artifact", source=source, weights=weights, weights_scanned=False)
    assert made.linked_shards() == {shard.name: shard}
    assert Manifest.load(tmp_path / "artifact") == made
    write_shard(shard, {"a": f32(3, 2)})
    refused(tmp_path / "artifact", "another", "--weights copy")
    shard.unlink()
    refused(tmp_path / "artifact", "missing", "model.safetensors")


def test_saving_is_durable_and_leaves_no_strays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact(tmp_path)
    before = (tmp_path / MANIFEST).read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        made.model_copy(update={"dtype": "fp32"}).save(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == before
    monkeypatch.undo()
    made.save(tmp_path)
    assert Manifest.load(tmp_path) == made
