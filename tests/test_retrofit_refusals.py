"""Graphs that are not read, decoders that are not cut, and what is said of them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from foreign_parity import STAGES, cut
from onnx import TensorProto, helper
from written_llama import MICROSOFT, Style, tiny_llama, write

from vtr_export.errors import AnalysisError, GateError, InputError, ScheduleError, VtrError
from vtr_export.retrofit import check
from vtr_export.retrofit.check import check_file
from vtr_export.retrofit.player import hidden

GQA = Style("gqa_rotary", "skip", opset=20, positions="none")
MATMUL = Style("matmul", "plain", opset=17)


def saved(folder: Path, style: Style, changes: dict[str, str]) -> Path:
    """The small decoder, its text changed."""
    file = folder / "decoder.onnx"
    ir.save(write(tiny_llama(style.kv_heads), style, **changes), file)
    return file


def refused(file: Path, folder: Path, kind: type[VtrError], words: str, **options: Any) -> VtrError:
    """The error, after which nothing is there."""
    with pytest.raises(kind, match=words) as caught:
        cut(file, folder, **options)
    assert caught.value.hint
    assert not (folder / "cut").exists()
    return caught.value


WINDOW = (
    "w_ = Constant <value_ints: ints = [{}]> () age = Sub (rows_column, keys) "
    "near = Less (age, w_) causal_ = And (causal, near) visible = And (causal_, real_keys)"
)
CASES = {
    "capped scores": (GQA, {"do_rotary: int": "softcap: float = 30.0, do_rotary: int"}, "softcap"),
    "a window in the operator": (
        GQA,
        {"do_rotary: int": "local_window_size: int = 4, do_rotary: int"},
        "local_window_size",
    ),
    "a short window in the mask": (
        MATMUL,
        {"visible = And (causal, real_keys)": WINDOW.format(4)},
        "does not see",
    ),
    "a window longer than any comparison": (
        MATMUL,
        {"visible = And (causal, real_keys)": WINDOW.format(4096)},
        "after 4099 tokens, token 4099 does not see token 0",
    ),
    "a window in a table": (
        MATMUL,
        {
            "visible = And (causal, real_keys)": "side = Constant <value_int: int = 90> () "
            "all_keys = Range (n0, side, n1) all_rows = Unsqueeze (all_keys, i1) "
            "ages = Sub (all_rows, all_keys) half = Constant <value_int: int = 45> () "
            "table_ = Less (ages, half) band = Slice (table_, p_, t_, i0) "
            "near = Slice (band, i0, t_, i1) causal_ = And (causal, near) "
            "visible = And (causal_, real_keys)"
        },
        "does not see token 0",
    ),
    "image tokens that see each other": (
        MATMUL,
        {"causal = LessOrEqual (keys, rows_column)": "causal = GreaterOrEqual (keys, n0)"},
        "sees token",
    ),
    "a bias by distance": (
        MATMUL,
        {
            "added = Where (visible, zero, low)": "age = Sub (rows_column, keys) "
            "age_f = Cast <to: int = 1> (age) added = Where (visible, age_f, low)"
        },
        "bias",
    ),
    "one cache for two layers": (
        Style(),
        {
            "float[b,2,p,16] pk_2, ": "",
            "float[b,2,p,16] pv_2, ": "",
            "pk_2, pv_2)": "pk_1, pv_1)",
        },
        "share the cache",
    ),
    "no present": (
        Style(),
        {
            ", float[b,2,t,16] allk_2, float[b,2,t,16] allv_2)": ")",
            "mixed_2, allk_2, allv_2 =": "mixed_2, allk_2, allv_2 =",
        },
        "no output",
    ),
    "an input that nobody knows": (
        Style(),
        {
            "act_1 = Mul (g_1, sg_1)": "act_ = Mul (g_1, sg_1) act_1 = Add (act_, extra)",
            "> g (": "> g (float[b,s,48] extra, ",
        },
        "'extra'",
    ),
    "a table of fixed length": (
        Style(),
        {
            "act_1 = Mul (g_1, sg_1)": "size_1 = Shape (g_1) n_ = Gather (size_1, n1) "
            "all_ = Range (n0, n_, n1) all_f = Cast <to: int = 1> (all_) "
            "all_c = Unsqueeze (all_f, im1) act_0_ = Mul (g_1, sg_1) act_1 = Mul (act_0_, all_c)"
        },
        "cannot be",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_decoder_that_a_cut_would_change_is_refused(name: str, tmp_path: Path) -> None:
    style, changes, words = CASES[name]
    error = refused(saved(tmp_path, style, changes), tmp_path, AnalysisError, words)
    assert error.where


def test_a_cut_that_drops_others_than_it_says_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin is told that the first vision tokens were kept, whichever were."""

    def first_ones(asked: Any, kept: Any) -> Any:
        return hidden(asked, [[np.sort(each % each.shape[1], 1) for each in call] for call in kept])

    monkeypatch.setattr("vtr_export.retrofit.gates.hidden", first_ones)
    file = saved(tmp_path, MATMUL, {})
    refused(file, tmp_path, GateError, "dropped_as_hidden.*nothing was published")


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    file, model = tmp_path / "model.onnx", model_of(helper.make_node("Neg", ["x"], ["y"]))
    model.opset_import[0].version = 11
    file.write_bytes(model.SerializeToString())
    refused(file, tmp_path, AnalysisError, "opset 11")


def test_a_rewrite_that_says_something_else_is_not_published(tmp_path: Path) -> None:
    """Heads tiled, not repeated one by one: it looks like grouped queries, and is not."""
    changes = {
        f"r{what}_{i} = Unsqueeze (h{what}_{i}, i2)": f"r{what}_{i} = Unsqueeze (h{what}_{i}, i1)"
        for what in "kv"
        for i in range(3)
    }
    changes |= {
        f"(b_, {what}kv_{i}, {what}g_{i}, t_": f"(b_, {what}g_{i}, {what}kv_{i}, t_"
        for what in "kv"
        for i in range(3)
    }
    file = saved(tmp_path, MATMUL, changes)
    refused(file, tmp_path, GateError, "canonical.*nothing was published")


def test_a_decoder_in_branches_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(deep(1).SerializeToString())
    refused(file, tmp_path, AnalysisError, "graph within")


def test_a_schedule_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, Style(), {})
    refused(
        file, tmp_path, ScheduleError, "3 layers", text=STAGES.replace("2, keep: 2", "7, keep: 2")
    )
    refused(file, tmp_path, InputError, "input_ids", image_token_id=3)


def model_of(*nodes: onnx.NodeProto, domains: tuple[str, ...] = ("",)) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph(list(nodes), "g", [x], [y])
    imports = [helper.make_opsetid(domain, 20 if not domain else 1) for domain in domains]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def external(location: str, length: str = "4") -> onnx.ModelProto:
    model = model_of(helper.make_node("Add", ["x", "w"], ["y"]))
    tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", length)):
        tensor.external_data.add(key=key, value=value)
    return model


def deep(levels: int) -> onnx.ModelProto:
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    for _ in range(levels):
        inner = helper.make_graph([node], "inner", [], [out])
        node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    return model_of(node)


FILES = {
    "a compiled context": (
        model_of(
            helper.make_node("EPContext", ["x"], ["y"], domain=MICROSOFT), domains=("", MICROSOFT)
        ),
        "EPContext",
    ),
    "an unknown domain": (
        model_of(helper.make_node("Magic", ["x"], ["y"], domain="acme"), domains=("", "acme")),
        "'acme'",
    ),
    "an unknown operator": (model_of(helper.make_node("Magic", ["x"], ["y"])), "Magic"),
    "a value from nowhere": (model_of(helper.make_node("Neg", ["z"], ["y"])), "z"),
    "weights above its folder": (external("../w.bin"), "outside its folder"),
    "weights at an absolute path": (external("/etc/hostname"), "outside its folder"),
    "weights that are missing": (external("w.bin"), "missing"),
    "weights that end early": (external("short.bin", "400"), "ends before"),
    "graphs in graphs in graphs": (deep(10), "deep"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_graph_is_looked_at_before_it_is_read(name: str, tmp_path: Path) -> None:
    model, words = FILES[name]
    file = tmp_path / "model.onnx"
    file.write_bytes(model.SerializeToString())
    (tmp_path / "short.bin").write_bytes(bytes(4))
    refused(file, tmp_path, InputError, words)


def test_a_link_to_weights_elsewhere_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.bin"
    elsewhere.write_bytes(bytes(4))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "w.bin").symlink_to(elsewhere)
    file = folder / "model.onnx"
    file.write_bytes(external("w.bin").SerializeToString())
    refused(file, tmp_path, InputError, "outside its folder")


@pytest.mark.parametrize("content", [b"", b"no model", bytes(range(256)) * 40])
def test_a_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    refused(file, tmp_path, InputError, "refused|crashed")
    refused(tmp_path / "nothing.onnx", tmp_path, InputError, "no such file")


def test_a_check_that_hangs_or_crashes_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"")
    with pytest.raises(InputError, match="more than"):
        check_file(file, seconds=0.001)
    monkeypatch.setattr(check.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="crashed"):
        check_file(file)
