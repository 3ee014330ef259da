"""One ONNX file for all, the plugin that stands behind its cuts, and which plugin is taken."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from cut_graphs import Client, Traced, Tracer, serialized
from graph_texts import graph, run
from hypothesis import given
from hypothesis import strategies as st
from kernel_on_host import Array, Guarded, HostLauncher, compile_for_host
from test_tensorrt_builds import build, needs_tensorrt

from vtr_export import ops
from vtr_export.backends.tensorrt import kernel, library, plugin
from vtr_export.backends.tensorrt.plugin import Plugin, find, notes_file, read_library, serves
from vtr_export.backends.tensorrt.python_plugin import (
    HIDDEN,
    KEYS,
    PORTS,
    QUERY,
    SERVED,
    Fields,
    classes,
)
from vtr_export.errors import EngineError, InputError, UnavailableError
from vtr_export.ops.prune import FIELDS, OUTPUTS, PLUGIN_NAMESPACE, PLUGIN_VERSION, PRUNE

CUTS = {1: 8, 2: 3}
SMS = ("--sm", "86,89,120")
PYTHON = ("--plugin", "python")
TARGET = "tensorrt-rtx"
DTYPES = {"float": "float32", "float16": "float16"}  # in graphs; in numpy and TensorRT
TOP_K = 3840  # TensorRT's own keeps at most this many


# --- one file for all ---


@dataclass(frozen=True)
class Decoder:
    """A file, and the model it was made from."""

    path: Path
    tiny: Traced


@pytest.fixture(scope="module")
def decoder(traced: Tracer, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    tiny = traced("fp16")
    path = tmp_path_factory.mktemp("decoder") / "decoder.onnx"
    path.write_bytes(serialized(tiny.cut(tiny.schedule(CUTS))))
    return Decoder(path, tiny)


def test_the_file_runs_in_onnx_runtime(decoder: Decoder) -> None:
    """The function's body: text and the kept vision tokens are left, then one step decodes."""
    tiny, client = decoder.tiny, Client(decoder.path.read_bytes())
    tokens, text, width = tiny.tokens, 5, client.inputs["inputs_embeds"].shape[-1]
    for new, vision in ((tokens + text, tokens), (1, 0)):
        seen = tokens + text + (new == 1)
        embeds = np.random.default_rng(new).normal(size=(1, new, width)).astype(np.float16)
        outputs = client(
            inputs_embeds=embeds,
            attention_mask=np.ones((1, seen), np.int64),
            position_ids=np.arange(seen - new, seen)[None],
            vision_index=np.arange(vision)[None] + 2,
        )
        assert np.isfinite(outputs["logits"]).all()
        for number, keep in enumerate(CUTS.values()):
            kept = outputs[f"kept.{number}"]
            assert kept.shape == (1, text + keep if vision else 1)
        assert outputs["present_mask.1"].shape[1] == text + keep + (new == 1)


@needs_tensorrt
def test_without_the_plugin_tensorrt_inlines_the_body(decoder: Decoder) -> None:
    layers = build(decoder.path, *SMS)["layers"]
    assert layers["TOPK"] == layers["SOFTMAX"] == len(CUTS)
    assert "PLUGIN_V3" not in layers


@needs_tensorrt
def test_with_the_plugin_each_cut_is_one_layer(decoder: Decoder) -> None:
    """Attention behind it is fused as ever: no plan comes without."""
    found = build(decoder.path, *SMS, *PYTHON)
    layers = found["layers"]
    assert layers["PLUGIN_V3"] == len(CUTS)
    assert not {"TOPK", "SOFTMAX"} & layers.keys()
    assert layers["ATTENTION_INPUT"] == decoder.tiny.facts.layers


@needs_tensorrt
@pytest.mark.parametrize(
    ("cuts", "options"),
    [
        ({0: 9, 2: 4}, {"source": "next", "heads": "max"}),
        ({1: 8, 2: 0}, {"rank": "per_image"}),
        ({1: 8, 2: 3}, {"drop_point": "inside"}),
        ({1: 8, 2: 3}, {"query": "text"}),
        ({0: 9, 2: 0}, {"query": "text", "source": "next", "heads": "max", "rank": "per_image"}),
    ],
    ids=["next_max", "per_image_and_nothing_left", "inside", "text", "text_all_other"],
)
def test_every_choice_the_plugin_serves_builds(
    cuts: dict[int, int], options: dict[str, Any], traced: Tracer, tmp_path: Path
) -> None:
    tiny = traced("fp16")
    model = tiny.cut(tiny.schedule(cuts, **options))
    assert serves(model) is None
    path = tmp_path / "decoder.onnx"
    path.write_bytes(serialized(model))
    assert build(path, *SMS, *PYTHON)["layers"]["PLUGIN_V3"] == len(cuts)


@needs_tensorrt
def test_a_budget_can_stay_an_input(traced: Tracer, tmp_path: Path) -> None:
    tiny, path = traced("fp16"), tmp_path / "decoder.onnx"
    path.write_bytes(serialized(tiny.cut(tiny.schedule(CUTS), tunable=True)))
    found = build(path, *PYTHON)
    assert found["shape_inputs"] == ["keep"]
    assert found["layers"]["PLUGIN_V3"] == len(CUTS)


@needs_tensorrt
def test_a_cut_may_keep_more_than_tensorrts_own_top_k(decoder: Decoder) -> None:
    """Half of an image of very many tokens, wherever the profile ends."""
    tokens = str(4 * TOP_K * decoder.tiny.tokens // CUTS[1])
    with pytest.raises(AssertionError, match=str(TOP_K)):
        build(decoder.path, "--vision", tokens)
    assert build(decoder.path, "--vision", tokens, *PYTHON)["layers"]["PLUGIN_V3"] == len(CUTS)


# --- the plugin itself ---


def cut(keep: int, choice: ops.Choice, dtype: str, **known: int) -> ir.Model:
    """A graph that is one cut; ``known``: dimensions that are no symbols."""
    rows, mask_rows = ("rows", "mask_rows") if choice.query == "text" else (1, 1)
    signature = (
        f"({dtype}[batch,4,{rows},16] query, {dtype}[batch,2,total,16] keys,"
        f" bool[batch,1,{mask_rows},total] mask,"
        f" int64[batch,vision] vision_index, int64[budgets] budget,"
        f" {dtype}[batch,sequence,32] hidden)"
        f" => ({dtype}[batch,kept,32] kept_hidden, int64[batch,kept] indices,"
        " int64[batch,keep] kept_vision_index)"
    )
    for name, size in known.items():
        signature = re.sub(rf"\b{name}\b(?=[],])", str(size), signature)
    model = graph(
        signature,
        f"keep = Constant <value_ints: ints = [{keep}]> ()"
        " kept_hidden, indices, kept_vision_index = vtr.VtrTopKPrune <scale: float = 0.25>"
        " (query, keys, mask, vision_index, keep, budget, hidden)",
        choice,
    )
    (node,) = (each for each in model.graph if ops.is_prune(each))
    for attribute in ops.prune_attributes(0.25, choice):
        node.attributes[attribute.name] = attribute
    return model


@needs_tensorrt
@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_every_type_builds_and_what_is_kept_is_a_constant(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(serialized(cut(TOP_K + 1, ops.Choice(), dtype)))
    found = build(path, *PYTHON, "--vision", str(2 * TOP_K), "--context")
    assert found["plugins"] == [[[-1, -1, 32], [-1, -1], [-1, TOP_K + 1]]]
    assert len(found["layers"]) == 2  # keep, and the plugin


@needs_tensorrt
def test_the_lengths_it_promises_are_those_of_the_operator(tmp_path: Path) -> None:
    """24 of 40 columns are text; 5 of 16 vision tokens are kept, in each of two rows."""
    path = tmp_path / "cut.onnx"
    known = {"batch": 2, "sequence": 40, "vision": 16, "total": 47, "budgets": 2}
    path.write_bytes(serialized(cut(5, ops.Choice(), "float16", **known)))
    found = build(path, *PYTHON, "--context")
    assert found["plugins"] == [[[2, 29, 32], [2, 29], [2, 5]]]


FIELDS_DRAWN = st.builds(
    Fields,
    st.floats(width=32, allow_nan=False),
    st.sampled_from(["last", "text"]),
    st.sampled_from(["mean", "max"]),
    st.sampled_from(["joint", "per_image"]),
)


@needs_tensorrt
@given(FIELDS_DRAWN)
def test_a_plan_holds_what_the_node_says(fields: Fields) -> None:
    trt = library.load(TARGET).trt
    made, creator = classes(trt)
    held = made(fields).clone().get_fields_to_serialize()
    assert [field.name for field in held] == [field.name for field in creator().field_names]
    again = creator().create_plugin("cut", held, trt.TensorRTPhase.RUNTIME)
    assert again.fields == fields
    assert (again.plugin_name, again.plugin_namespace, again.plugin_version) == (PRUNE, "vtr", "1")


@needs_tensorrt
def test_a_plugin_is_told_the_fields_that_its_node_has() -> None:
    made, creator = classes(library.load(TARGET).trt)
    said = {attribute.name for attribute in ops.prune_attributes(0.5, ops.Choice())}
    parsers = {"plugin_namespace", "plugin_version", "tensorrt_plugin_shape_input_indices"}
    assert {field.name for field in creator().field_names} == said - parsers == set(FIELDS)
    first = made(Fields(1.0, "first", "mean", "joint")).get_fields_to_serialize()  # type: ignore[arg-type]  # a newer node may say so
    with pytest.raises(EngineError, match="query: first"):
        creator().create_plugin("cut", first, None)
    with pytest.raises(EngineError, match="scale, query, heads, rank"):
        creator().create_plugin("cut", [], None)


def test_both_shells_know_the_same_names() -> None:
    """What one writes into a plan the other reads; the C++ shell is text here."""
    text = (kernel.sources() / "plugin.cpp").read_text()
    assert re.findall(r'{+"(\w+)", nullptr, PluginFieldType::(\w+)', text) == [
        (name, "kFLOAT32" if name == "scale" else "kCHAR") for name in FIELDS
    ]
    said = dict(re.findall(r'(NAME|VERSION|NAMESPACE)\[\] = "(\w+)"', text))
    assert said == {"NAME": PRUNE, "VERSION": PLUGIN_VERSION, "NAMESPACE": PLUGIN_NAMESPACE}
    for enum, names in (("Input", PORTS), ("Output", OUTPUTS)):
        (listed,) = re.findall(rf"enum {enum} {{ (.+?), \w+ }}", text)
        assert listed.lower().split(", ") == list(names)
    for words in SERVED.values():
        assert all(f'"{word}"' in text for word in words)


def test_the_readme_lists_what_the_node_says() -> None:
    text = (kernel.sources() / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    said = {each.name: each.value for each in ops.prune_attributes(0.5, ops.Choice())}
    assert [name for name, _, _ in rows] == list(said)
    assert [name for name, _, use in rows if use.startswith("field")] == list(FIELDS)
    for name, served, _ in rows:
        if name in SERVED:
            assert tuple(served.split(", ")) == SERVED[name]
        elif name != "scale":
            value = said[name]
            assert served == (value if isinstance(value, str) else ", ".join(map(str, value)))


def test_the_kernel_gets_its_pointers_in_the_order_of_the_plugins_ports() -> None:
    """TensorRT passes every input but keep, then every output."""
    assert kernel.Pointers._fields == (*PORTS, *OUTPUTS)
    assert (*PORTS[:4], "keep", *PORTS[4:]) == ops.prune.INPUTS


@dataclass(frozen=True)
class Call:
    """Arrays of one call of a cut by name, and how many vision tokens it keeps."""

    feeds: dict[str, Array]
    keep: int

    @property
    def shapes(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Of the plugin's inputs and outputs."""
        batch, length, width = self.feeds["hidden"].shape
        kept = length - self.feeds["vision_index"].shape[1] + self.keep
        outputs = [(batch, kept, width), (batch, kept), (batch, self.keep)]
        return [self.feeds[name].shape for name in PORTS], outputs


def drawn(
    keep: int, rank: str, dtype: Any, query: str = "last", images: int = 3, image: int = 7
) -> Call:
    """Rows without pads after a past of four; two columns of text behind the last image."""
    rng, batch, vision = np.random.default_rng(keep), 2, images * image
    length, total = vision + 5, vision + 9
    every = [np.sort(rng.permutation(length - 2)[:vision]) for _ in range(batch)]
    rows, seen = (7, length) if query == "text" else (1, 1)
    causal = np.tri(seen, total, total - seen, dtype=bool)
    feeds = {
        "query": rng.normal(size=(batch, 4, rows, 16)).astype(dtype),
        "keys": rng.normal(size=(batch, 2, total, 16)).astype(dtype),
        "mask": np.repeat(causal[None, None], batch, 0),
        "vision_index": np.stack(every),
        "budget": np.full(batch, keep) if rank == "joint" else np.array([images]),
        "hidden": rng.normal(size=(batch, length, 32)).astype(dtype),
    }
    return Call(feeds, keep)


def described(trt: Any, shapes: list[tuple[int, ...]], types: list[Any]) -> list[Any]:
    tensors = [trt.PluginTensorDesc() for _ in shapes]
    for tensor, shape, kind in zip(tensors, shapes, types, strict=True):
        tensor.dims, tensor.type = shape, kind
    return tensors


def bounded(trt: Any, tensors: list[Any]) -> list[Any]:
    """As in a profile that ends at these shapes."""
    dynamic = [trt.DynamicPluginTensorDesc() for _ in tensors]
    for each, tensor in zip(dynamic, tensors, strict=True):
        each.desc, each.max = tensor, tensor.dims
    return dynamic


def of_type(trt: Any, data: Any) -> tuple[list[Any], list[Any]]:
    """The types of inputs and outputs."""
    return [data, data, trt.bool, trt.int64, trt.int64, data], [data, trt.int64, trt.int64]


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> HostLauncher:
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler here: apt-get install g++")
    return HostLauncher(compile_for_host(tmp_path_factory.mktemp("kernels")))


@needs_tensorrt
@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("query", ["last", "text"])
@pytest.mark.parametrize(
    ("keep", "rank"), [(8, "joint"), (0, "joint"), (21, "joint"), (9, "per_image")]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_it_enqueues_computes_what_onnx_runtime_does(
    dtype: str,
    keep: int,
    rank: Any,
    query: Any,
    heads: Any,
    on_host: HostLauncher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plugin's own launch, of the kernel compiled for the CPU."""
    trt = library.load(TARGET).trt
    call = drawn(keep, rank, DTYPES[dtype], query)
    expected = run(cut(keep, ops.Choice(query, heads, rank), dtype), call.feeds)
    inputs, outputs = (
        described(trt, shapes, types)
        for shapes, types in zip(
            call.shapes, of_type(trt, getattr(trt, DTYPES[dtype])), strict=True
        )
    )
    made = classes(trt)[0](Fields(0.25, query, heads, rank))
    arrays = [call.feeds[name] for name in PORTS]
    results = [np.full_like(expected[name], 77) for name in OUTPUTS]
    workspace = Guarded(made.get_workspace_size(bounded(trt, inputs), bounded(trt, outputs)))
    monkeypatch.setattr(kernel, "launcher", lambda: on_host)
    pointers = ([array.ctypes.data for array in both] for both in (arrays, results))
    made.enqueue(inputs, outputs, *pointers, workspace.pointer, 0)
    for name, actual in zip(OUTPUTS, results, strict=True):
        assert actual.tolist() == expected[name].tolist(), name


@needs_tensorrt
def test_heads_too_wide_for_the_kernel_are_refused_before_anything_is_built() -> None:
    trt = library.load(TARGET).trt
    made = classes(trt)[0](Fields(1.0, "last", "mean", "joint"))
    for width, fits in ((kernel.MOST_HEAD_DIM, True), (kernel.MOST_HEAD_DIM + 1, False)):
        shapes = [(1, 1, 1, width), (1, 1, 9, width)]
        inputs = bounded(trt, described(trt, shapes, [trt.float16] * 2))
        with nullcontext() if fits else pytest.raises(EngineError, match=str(width)):
            made.configure_plugin(inputs, [])


@needs_tensorrt
def test_only_plain_tensors_of_the_kernels_types_are_taken() -> None:
    trt = library.load(TARGET).trt
    made, call = classes(trt)[0](Fields(1.0, "last", "mean", "joint")), drawn(8, "joint", "f4")

    def taken(at: int, kind: Any = None, form: Any = None, data: Any = trt.float16) -> bool:
        types = [each for both in of_type(trt, data) for each in both]
        tensors = described(trt, [shape for both in call.shapes for shape in both], types)
        tensors[at].type = kind or types[at]
        tensors[at].format = form or trt.TensorFormat.LINEAR
        return bool(made.supports_format_combination(at, bounded(trt, tensors), len(PORTS)))

    count = len(PORTS) + len(OUTPUTS)
    for data in (trt.float32, trt.float16, trt.bfloat16):
        assert all(taken(at, data=data) for at in range(count))
    assert not any(taken(at, data=trt.int8) for at in (QUERY, KEYS, HIDDEN, count - 3))
    assert not any(taken(at, form=trt.TensorFormat.CHW32) for at in range(count))
    assert not any(taken(at, kind=trt.int32) for at in range(count))
    assert not any(taken(at, kind=trt.bfloat16) for at in (KEYS, HIDDEN, count - 3))


SIZES = st.fixed_dictionaries(
    {name: st.integers(1, 9000) for name in ("total", "new", "vision", "keep", "hidden")}
    | {name: st.integers(1, 64) for name in ("batch", "heads", "head_dim", "query_rows")}
)


@pytest.mark.parametrize("query", ["last", "text"])
@given(SIZES, SIZES)
def test_the_largest_shape_of_a_profile_needs_the_most_workspace(
    query: Any, one: dict[str, int], other: dict[str, int]
) -> None:
    """TensorRT asks for the profile's largest shape alone."""

    def needed(sizes: dict[str, int]) -> int:
        return kernel.workspace_bytes(kernel.Shape(**sizes, kv_heads=1, mask_rows=1, query=query))

    most = {name: max(one[name], other[name]) for name in one}
    assert needed(most) >= max(needed(one), needed(other)) > 0


def test_a_choice_that_no_kernel_has_is_not_served(traced: Tracer) -> None:
    tiny = traced("fp16")
    model = tiny.cut(tiny.schedule(CUTS))
    assert serves(model) is None
    (*_, last) = (node for node in model.graph if ops.is_prune(node))
    last.attributes["query"] = ir.AttrString("query", "first")
    assert "query: first" in (serves(model) or "")
    assert "no cut" in (serves(tiny.cut(tiny.schedule({}))) or "")


# --- which plugin is taken ---


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No library is named, and none is where ours are written."""
    monkeypatch.delenv(plugin.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def compiled(
    nothing_built: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, Any]]:
    """A file that stands for a library of these sources, named by the variable, and its notes."""
    path = tmp_path / kernel.LIBRARY
    path.write_bytes(b"not loaded by who only looks")
    notes = {
        "plugin": PRUNE,
        "version": "1",
        "sha256": kernel.sha256(),
        "targets": ["tensorrt", TARGET],
        "sms": [86, 120],
    }
    notes_file(path).write_text(json.dumps(notes))
    monkeypatch.setenv(plugin.VARIABLE, str(path))
    return path, notes


@pytest.mark.usefixtures("nothing_built")
def test_without_a_library_the_python_plugin_is_taken_where_it_is_needed() -> None:
    assert find("off", TARGET, needed=True) is None
    assert find("auto", TARGET) is None
    for found in (find("auto", TARGET, needed=True), find("on", TARGET)):
        assert found is not None
        assert (found.kind, found.version, found.sha256) == ("python", "1", kernel.sha256())
        assert found.passed_over == ()
    with pytest.raises(InputError, match="'yes'"):
        find("yes", TARGET)  # type: ignore[arg-type]  # what a user may type


def test_a_library_of_these_sources_is_taken(
    compiled: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = compiled
    for named in (path, path.parent):
        monkeypatch.setenv(plugin.VARIABLE, str(named))
        for found in (find("auto", TARGET), find("on", TARGET)):
            assert found == Plugin("library", kernel.sha256(), path, (86, 120))
        assert find("off", TARGET) is None


def test_a_library_is_found_where_ours_are_written(
    compiled: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = compiled
    monkeypatch.delenv(plugin.VARIABLE)
    assert find("auto", TARGET) is None
    built = kernel.library_path()
    built.parent.mkdir(parents=True)
    for file in (path, notes_file(path)):
        built.with_name(file.name).write_bytes(file.read_bytes())
    found = find("auto", TARGET)
    assert found is not None
    assert found.path == built


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("sha256", "0" * 64, "sha256 is 0000"),
        ("version", "2", "version is 2"),
        ("plugin", "VtrOther", "plugin is VtrOther"),
        ("targets", ["tensorrt"], "compiled for tensorrt, not for tensorrt-rtx"),
        ("sms", None, "says too little"),
        ("bytes", 12, "its notes say 12"),
    ],
)
def test_a_library_of_something_else_is_refused_with_the_reason(
    compiled: tuple[Path, dict[str, Any]], key: str, value: Any, words: str
) -> None:
    path, notes = compiled
    notes_file(path).write_text(json.dumps(notes | {key: value}))
    found, why = read_library(path, TARGET)
    assert found is None
    assert words in why
    assert find("auto", TARGET) is None
    instead = find("on", TARGET)
    assert instead is not None
    assert instead.kind == "python"
    assert words in instead.passed_over[0]


def test_a_library_without_notes_or_file_is_refused(compiled: tuple[Path, dict[str, Any]]) -> None:
    path, _ = compiled
    notes_file(path).write_text("not json")
    assert "says too little" in read_library(path, TARGET)[1]
    notes_file(path).unlink()
    assert "cannot be read" in read_library(path, TARGET)[1]
    path.unlink()
    assert "no such file" in read_library(path, TARGET)[1]


@pytest.mark.usefixtures("nothing_built")
def test_without_the_kernels_sources_there_is_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise UnavailableError("no sources")

    monkeypatch.setattr(kernel, "sha256", missing)
    with pytest.raises(UnavailableError):
        find("on", TARGET)


@needs_tensorrt
def test_a_process_holds_one_plugin(compiled: tuple[Path, dict[str, Any]]) -> None:
    script = """
from vtr_export.backends.tensorrt import library, plugin
from vtr_export.errors import EngineError
trt = library.load("tensorrt-rtx")
for _ in range(2):
    plugin.in_python().register(trt)
try:
    plugin.find("on", trt.target).register(trt)
except EngineError as error:
    print(error.message)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "registered already" in done.stdout


@needs_tensorrt
def test_a_file_that_is_no_library_is_refused_when_it_is_loaded(
    compiled: tuple[Path, dict[str, Any]],
) -> None:
    found = find("on", TARGET)
    assert found is not None
    with pytest.raises(EngineError, match="does not load the plugin"):
        found.register(library.load(TARGET))
