"""What a user can get wrong, one line each: refused by name, in time, and nothing is left behind."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Done, vtr
from PIL import Image

from vtr_export.checkpoint import Checkpoint
from vtr_export.exporter import Report

MODEL = ("-m", "model")
ENGINES = ["--dtype", "fp16", "--plugin", "off", "--target"]
SCHEDULE = "version: 1\nprefill:\n  stages:\n  - {before_layer: 1, keep: 50%}\n"


@dataclass(frozen=True)
class Place:
    """A folder of its own: a model of 3 layers and 16 tokens an image, a schedule, a target."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def schedule(self) -> Path:
        return self.folder / "s.yaml"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def shard(self) -> Path:
        return sorted(self.model.glob("*.safetensors"))[1]

    def config(self, part: str = "", **values: Any) -> None:
        """Change ``config.json``, or an object in it."""
        self.change("config.json", lambda config: (config[part] if part else config).update(values))

    def change(self, name: str, change: Callable[[Any], Any]) -> None:
        file = self.model / name
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    def header(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change the header of one shard, its data stays."""
        raw = self.shard().read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        self.shard().write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    def only(self, *names: str) -> None:
        """Remove everything else from the model."""
        for file in self.model.iterdir():
            if file.name not in names:
                file.unlink()

    def write(self, name: str, content: str | bytes = "{}") -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (self.folder / name).write_bytes(data)


Arrange = Callable[[Place], object]


@dataclass(frozen=True)
class Case:
    """What is done to the place, and what the error must name; ``where`` is a part of its place."""

    what: str
    arrange: Arrange
    code: str
    where: str
    words: str
    arguments: Sequence[str] = MODEL

    def __str__(self) -> str:
        return self.what


def overlap(header: dict[str, Any]) -> None:
    second = sorted(n for n in header if n != "__metadata__")[1]
    header[second]["data_offsets"] = [at - 32 for at in header[second]["data_offsets"]]


def yaml(text: str) -> Arrange:
    """A schedule: what comes after ``version: 1`` and ``prefill:``."""
    return lambda place: place.write("s.yaml", f"version: 1\nprefill:\n{text}\n")


def wide(place: Place) -> None:
    """4096 tokens an image, 3900 of them kept."""
    place.config("vision_config", image_size=448)
    yaml("  keep: [4096, 3900, 3900]")(place)


def artifact_there(place: Place) -> None:
    place.out.mkdir()
    place.write("out/manifest.json", '{"format": 1, "versions": {"vtr_export": "0.1.0"}}')


CHECKPOINTS = [
    Case("a file", lambda p: None, "VTR002", "s.yaml", "a model is a folder", ["-m", "s.yaml"]),
    Case("no such folder", lambda p: None, "VTR002", "x/y", "no such model", ["-m", "./x/y"]),
    Case("not in the cache", lambda p: None, "VTR002", "hub", "hf download", ["-m", "no-one/nothing"]),
    Case("not a model folder", lambda p: p.only(), "VTR002", "model", "no config.json"),
    Case("config is no JSON", lambda p: p.write("model/config.json", "{"), "VTR002", "config.json", "JSON"),
    Case("unsupported model_type", lambda p: p.config(model_type="mamba"), "VTR002", "config.json", "supported: "),
    Case("unsupported decoder", lambda p: p.config("text_config", model_type="mamba"), "VTR002", "config.json", "llama, mistral, mllama"),
    Case("no sense in the config", lambda p: p.config("text_config", hidden_size=-1), "VTR002", "config.json", "hidden_size is -1"),
    Case("no image token", lambda p: p.config(image_token_index="x"), "VTR002", "config.json", "image_token_index"),
    Case("quantised", lambda p: p.config(quantization_config={"quant_method": "awq"}), "VTR002", "config.json", "quantised (awq)"),
    Case("quantised decoder", lambda p: p.config("text_config", quantization_config={"quant_method": "gptq"}), "VTR002", "config.json", "quantised (gptq)"),
    Case("quantised, no method", lambda p: p.config(quantization_config={}), "VTR002", "config.json", "unquantised checkpoint"),
    Case("quantised by its file", lambda p: p.write("model/hf_quant_config.json"), "VTR002", "hf_quant", "quantised"),
    Case("only an adapter", lambda p: (p.only(), p.write("model/adapter_config.json")), "VTR002", "model", "merge"),
    Case("an adapter beside a config", lambda p: (p.only("config.json"), p.write("model/adapter_config.json")), "VTR002", "model", "adapter"),
    Case("pickled weights", lambda p: (p.only("config.json"), p.write("model/pytorch_model.bin")), "VTR002", "model", "run code"),
    Case("no weights", lambda p: p.only("config.json"), "VTR002", "model", "no weights"),
    Case("missing shard", lambda p: p.shard().unlink(), "VTR002", "model-00002", "missing"),
    Case("truncated shard", lambda p: p.shard().write_bytes(p.shard().read_bytes()[:-1]), "VTR002", "model-00002", "truncated"),
    Case("empty shard", lambda p: p.shard().write_bytes(b""), "VTR002", "model-00002", "damaged"),
    Case("header is no JSON", lambda p: p.shard().write_bytes(p.shard().read_bytes().replace(b'"', b"'", 1)), "VTR002", "model-00002", "JSON"),
    Case("tensors overlap", lambda p: p.header(overlap), "VTR002", "model-00002", "overlaps"),
    Case("bytes nobody owns", lambda p: p.shard().write_bytes(p.shard().read_bytes() + b"x"), "VTR002", "model-00002", "after the last"),
    Case("index is no JSON", lambda p: p.write("model/model.safetensors.index.json", "{"), "VTR002", "index.json", "JSON"),
    Case("index without a map", lambda p: p.write("model/model.safetensors.index.json"), "VTR002", "index.json", "weight_map"),
    Case("tokenizer is no JSON", lambda p: p.write("model/tokenizer.json", "{"), "VTR002", "tokenizer.json", "JSON"),
    Case("end token is no number", lambda p: p.change("generation_config.json", lambda c: c.update(eos_token_id="x")), "VTR002", "generation_config.json", "eos_token_id"),
]  # fmt: skip
SCHEDULES = [
    Case("no such schedule", lambda p: p.schedule.unlink(), "VTR001", "s.yaml", "cannot read"),
    Case("no model named", lambda p: None, "VTR001", "s.yaml", "--model", []),
    Case("not YAML", lambda p: p.write("s.yaml", "a: ["), "VTR001", "s.yaml:1", "YAML"),
    Case("not text", lambda p: p.write("s.yaml", b"\xff\xfe"), "VTR001", "s.yaml", "UTF-8"),
    Case("too few layers", yaml("  keep: [16, 8]"), "VTR001", "s.yaml:3: prefill.keep", "the model has 3"),
    Case("too many layers", yaml("  keep: [16, 8, 8, 8]"), "VTR001", "s.yaml:3: prefill.keep", "the model has 3"),
    Case("a stage too deep", yaml("  stages:\n  - {before_layer: 3, keep: 1}"), "VTR001", "s.yaml:4", "before layer 2"),
    Case("more tokens than an image has", yaml("  keep: [17, 8, 8]"), "VTR001", "s.yaml:3: prefill.keep[0]", "at most 16"),
    Case("a keep that grows", yaml("  keep:\n  - 16\n  - 4\n  - 8"), "VTR001", "s.yaml:6: prefill.keep[2]", "grows from 4 to 8"),
    Case("a share that grows", yaml("  keep: [16, 25%, 8]"), "VTR001", "s.yaml:3: prefill.keep[2]", "grows from 25% to 8"),
    Case("a cut before layer 0", yaml("  stages:\n  - {before_layer: 0, keep: 1}"), "VTR001", "s.yaml:4", "from: next"),
    Case("an unknown key", yaml("  stages:\n  - {before_layers: 1, keep: 1}"), "VTR001", "s.yaml:4", "did you mean before_layer?"),
    Case("a key twice", yaml("  keep: [16, 8, 8]\n  rank: joint\n  keep: [16, 4, 4]"), "VTR001", "s.yaml:5", "twice, first in line 3"),
    Case("an anchor", yaml("  keep: &a [16, 8, 8]"), "VTR001", "s.yaml:3", "write the value out"),
    Case("a float", yaml("  stages:\n  - {before_layer: 1, keep: 0.5}"), "VTR001", "s.yaml:4", "write 50%"),
    Case("keep and stages", yaml("  keep: [16, 8, 8]\n  stages: []"), "VTR001", "s.yaml:2", "not both"),
    Case("another version", lambda p: p.write("s.yaml", "version: 2\n"), "VTR001", "s.yaml:1", "version: 1"),
    Case("beyond TensorRT's TopK", wide, "VTR001", "s.yaml:3: prefill.keep[1]", "at most 3840", [*MODEL, *ENGINES, "tensorrt"]),
    Case("beyond TensorRT-RTX's", wide, "VTR001", "s.yaml:3: prefill.keep[1]", "at most 3840", [*MODEL, *ENGINES, "tensorrt-rtx"]),
    Case("an unknown target", lambda p: None, "VTR202", "", "onnxruntime", [*MODEL, "--target", "abacus"]),
]  # fmt: skip
TARGETS = [
    Case("exists", artifact_there, "VTR201", "out", "--force"),
    Case("holds something else", lambda p: (p.out.mkdir(), p.write("out/thesis.txt")), "VTR201", "out", "something else", [*MODEL, "--force"]),
    Case("is a file", lambda p: p.write("out"), "VTR201", "out", "is a file"),
    Case("lies below a file", lambda p: None, "VTR201", "s.yaml/out", "is a file", [*MODEL, "-o", "s.yaml/out"]),
    Case("cannot be written", lambda p: None, "VTR201", "/proc/out", "may write", [*MODEL, "-o", "/proc/out", "--weights", "link"]),
    Case("a scope that is none", lambda p: None, "VTR202", "", "layers:K", [*MODEL, "--verify", "layers:0"]),
    Case("a dump that is a file", lambda p: None, "VTR202", "s.yaml", "folder", [*MODEL, "--dump", "s.yaml"]),
]  # fmt: skip


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(tmp_path)
    place.model.mkdir()
    for file in checkpoint.iterdir():
        (place.model / file.name).write_bytes(file.read_bytes())
    place.write("s.yaml", SCHEDULE)
    monkeypatch.chdir(tmp_path)
    return place


def contents(folder: Path) -> dict[str, bytes | None]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in files.items()}


def check_refused(done: Done, case: Case) -> None:
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert f"error[{case.code}]: " in done.err
    error = done.json["error"]
    assert error["code"] == case.code
    assert case.where in error["where"]
    assert case.words in f"{error['message']} {error['hint']}"
    assert error["hint"]


@pytest.mark.parametrize("case", [*CHECKPOINTS, *SCHEDULES, *TARGETS], ids=str)
def test_export_refuses_before_it_reads_a_weight(case: Case, place: Place) -> None:
    case.arrange(place)
    before = contents(place.folder)
    done = vtr("export", "-s", "s.yaml", "-o", "out", "--json", *case.arguments)
    check_refused(done, case)
    assert {"trace", "copy weights"}.isdisjoint(done.err.splitlines())
    assert contents(place.folder) == before


@pytest.mark.parametrize("case", SCHEDULES, ids=str)
def test_plan_refuses_the_same_schedules(case: Case, place: Place) -> None:
    case.arrange(place)
    asked = ("plan", "-s", "s.yaml", "--plugin", "off", "--json", *case.arguments)
    check_refused(vtr(*asked), case)


# --- what shows only when transformers or the weights are looked at ------------------------------


BUILDS = [
    Case("another shape than the config's", lambda p: p.config("text_config", intermediate_size=96), "VTR002", ".safetensors", "shape"),
    Case("a layer without weights", lambda p: p.config("text_config", num_hidden_layers=5), "VTR002", "model", "in no shard"),
    Case("text where a number belongs", lambda p: p.config(image_seq_length="x"), "VTR002", "config.json", "cannot read"),
    Case("no dtype in a list of them", lambda p: p.config(dtype=[]), "VTR002", "config.json", "cannot read"),
    Case("a rotary base that is no number", lambda p: p.config("text_config", rope_parameters={"rope_type": "default", "rope_theta": "x"}), "VTR002", "config.json", "cannot build"),
    Case("an activation nobody knows", lambda p: p.config("text_config", hidden_act="x"), "VTR002", "config.json", "cannot build"),
    Case("weights stored as integers", lambda p: p.header(as_integers), "VTR002", "model-00002", "stored as I32: the checkpoint is quantised"),
]  # fmt: skip


def as_integers(header: dict[str, Any]) -> None:
    next(entry for name, entry in header.items() if name.endswith("proj.weight"))["dtype"] = "I32"


@pytest.mark.parametrize("case", BUILDS, ids=str)
def test_export_refuses_what_transformers_would_not_build(case: Case, place: Place) -> None:
    case.arrange(place)
    before = contents(place.folder)
    done = vtr("export", "-s", "s.yaml", "-o", "out", "--json", *case.arguments)
    check_refused(done, case)
    assert "copy weights" not in done.err.splitlines()
    assert contents(place.folder) == before


@contextmanager
def planted(checkpoint: Path, value: float) -> Iterator[str]:
    """One weight of the shared model is another for a while; its tensor's name."""
    name, ref = next(
        item
        for item in Checkpoint.open(checkpoint).tensors.items()
        if item[0].endswith("layers.1.mlp.up_proj.weight")
    )
    with ref.shard.open("r+b") as file:
        file.seek(ref.offset + 40)
        was = file.read(4)
        file.seek(ref.offset + 40)
        file.write(np.float32(value).tobytes())
        file.flush()
        try:
            yield name
        finally:
            file.seek(ref.offset + 40)
            file.write(was)


@pytest.mark.usefixtures("shared_traces")
@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (float("nan"), "fp32", "holds nan at [0, 10]"),
        (float("-inf"), "fp32", "holds -inf at [0, 10]"),
        (1e5, "fp16", "beyond the range of float16 at [0, 10]"),
    ],
)
def test_a_weight_that_is_no_number_is_named_and_nothing_is_published(
    checkpoint: Path, place: Place, value: float, dtype: str, words: str
) -> None:
    arguments = ["-m", checkpoint, "-o", "out", "--dtype", dtype, "--json"]
    with planted(checkpoint, value) as name:
        done = vtr("export", "-s", "s.yaml", *arguments)
    check_refused(done, Case("", lambda p: None, "VTR003", "model-0000", words))
    assert name in done.err
    assert not place.out.exists()
    assert [path.name for path in place.folder.iterdir() if ".tmp-" in path.name] == []


@pytest.mark.usefixtures("shared_traces")
@pytest.mark.parametrize("free_bytes", [0, 100_000, 250_000])
def test_a_full_disk_is_named_and_the_old_artifact_stays(
    small_disk: Path, checkpoint: Path, place: Place, free_bytes: int
) -> None:
    """Too little for the weights is said at once, too little for the rest when it is used up."""
    arguments = [
        "-s",
        "s.yaml",
        "-m",
        checkpoint,
        "-o",
        small_disk / "out",
        "--no-verify",
        "--json",
    ]
    assert vtr("export", *arguments).code == 0
    before = contents(small_disk)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - free_bytes))
    done = vtr("export", *arguments, "--force")
    check_refused(done, Case("", lambda p: None, "VTR201", "out", "full"))
    (small_disk / "ballast").unlink()
    assert contents(small_disk) == before


RUNS: list[tuple[str, list[str], str, str, str]] = [
    ("no image", ["-p", "why"], "VTR202", "", "--image FILE"),
    ("a place and no image", ["-p", "<image> why", "--no-image"], "VTR202", "", "one image for each <image>"),
    ("two images, one place", ["-p", "<image> why", "-i", "a.png", "-i", "a.png"], "VTR202", "", "2 are given"),
    ("an image at the end", ["-p", "why <image>", "-i", "a.png"], "VTR202", "", "question behind it"),
    ("both ways", ["-p", "why", "-i", "a.png", "--no-image"], "VTR202", "", "exclude"),
    ("no such file", ["-p", "why", "-i", "b.png"], "VTR202", "b.png", "no such image"),
    ("an address", ["-p", "why", "-i", "https://a.b/c.png"], "VTR202", "c.png", "not fetched"),
    ("a folder", ["-p", "why", "-i", "model"], "VTR202", "model", "no such image"),
    ("not an image", ["-p", "why", "-i", "s.yaml"], "VTR202", "s.yaml", "not an image"),
    ("an empty file", ["-p", "why", "-i", "empty.png"], "VTR202", "empty.png", "not an image"),
    ("half an image", ["-p", "why", "-i", "half.png"], "VTR202", "half.png", "damaged"),
    ("a keep that is frozen", ["-p", "why", "-i", "a.png", "--keep", "4"], "VTR202", "", "--tunable"),
    ("no token", ["-p", "why", "-i", "a.png", "--max-new-tokens", "0"], "VTR202", "", "at least 1"),
    ("no thread", ["-p", "why", "-i", "a.png", "--threads", "0"], "VTR202", "", "at least 1"),
    ("a cold temperature", ["-p", "why", "-i", "a.png", "--temperature", "nan"], "VTR202", "", "or more"),
    ("a picture of no format", ["-p", "why", "-i", "a.png", "--show-kept", "k.xyz"], "VTR202", "k.xyz", ".png"),
    ("a picture nowhere", ["-p", "why", "-i", "a.png", "--show-kept", "no/k.png"], "VTR202", "no/k.png", "exists"),
]  # fmt: skip


@pytest.fixture
def images(place: Place) -> Place:
    picture = Image.effect_noise((40, 30), 80).convert("RGB")
    picture.save(place.folder / "a.png")
    place.write("half.png", (place.folder / "a.png").read_bytes()[:400])
    place.write("empty.png", b"")
    return place


@pytest.mark.parametrize(("what", "arguments", "code", "where", "words"), RUNS, ids=lambda x: "")
def test_run_refuses_and_says_nothing_else_on_stdout(
    images: Place,
    exported: tuple[Path, Report],
    what: str,
    arguments: list[str],
    code: str,
    where: str,
    words: str,
) -> None:
    done = vtr("run", exported[0], *arguments, "--json")
    check_refused(done, Case(what, lambda p: None, code, where, words))
    assert done.out.count("\n") == 1
    assert vtr("run", exported[0], *arguments).out == ""
    assert not list(images.folder.glob("k*"))


@pytest.mark.parametrize(
    ("damage", "where", "words"),
    [
        (lambda out: (out / "manifest.json").unlink(), "", "no manifest.json"),
        (lambda out: (out / "manifest.json").write_text("{"), "manifest.json", "JSON"),
        (
            lambda out: (out / "manifest.json").write_text('{"format": 9}'),
            "manifest.json",
            "upgrade",
        ),
        (lambda out: (out / "onnx" / "embed_tokens.onnx").unlink(), "embed_tokens", "missing"),
        (lambda out: (out / "tokenizer.json").write_text("{}"), "tokenizer.json", "damaged"),
        (lambda out: (out / "config.json").open("a").write(" "), "config.json", "damaged"),
    ],
)
@pytest.mark.parametrize("command", ["run", "verify", "bench"])
def test_a_damaged_artifact_is_refused(
    images: Place,
    exported: tuple[Path, Report],
    command: str,
    damage: Callable[[Path], object],
    where: str,
    words: str,
) -> None:
    out = shutil.copytree(exported[0], images.out)
    damage(out)
    more = ["-p", "why", "-i", "a.png"] if command == "run" else []
    done = vtr(command, out, *more, "--json")
    check_refused(done, Case("", lambda p: None, "VTR201", where, words))


def test_run_gives_the_answer_alone(images: Place, exported: tuple[Path, Report]) -> None:
    arguments = ["-i", "a.png", "-p", "which digit", "--max-new-tokens", "5"]
    asked = vtr("run", exported[0], *arguments, "--json")
    assert (asked.code, asked.err) == (0, "")
    answer = asked.json["answer"]
    assert 0 < len(asked.json["token_ids"]) <= 5
    assert len(asked.json["kept"][0]) == 8
    for more in ([], ["--no-stream"]):
        done = vtr("run", exported[0], *arguments, *more)
        assert (done.code, done.out, done.err) == (0, f"{answer}\n", "")
    loud = vtr("run", exported[0], *arguments, "--show-kept", "kept.png", "-v")
    assert (loud.code, loud.out) == (0, f"{answer}\n")
    assert "vision tokens by stage  16, 8" in loud.err
    assert Image.open("kept.png").width > 16
    text = vtr("run", exported[0], "--no-image", "-p", "which digit", "--json")
    assert (text.code, text.json["vision_tokens"]) == (0, 0)
