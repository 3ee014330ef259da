"""Sessions: bound tensors, devices that are there or refused, weights that lie elsewhere."""

import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from vtr_export.errors import ArtifactError, InputError, UnavailableError
from vtr_export.runtime.session import OnnxRuntime, Resident, open_session

GRAPH = """
<ir_version: 10, opset_import: ["": 21]>
g (float[B, 2, P, 4] past, float[B, S, 4] x, bfloat16[N] half) =>
  (float[B, 2, T, 4] present, float[B, S, 4] y, bfloat16[N] twice) {
  axis = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [1, 2, 1, 1]> ()
  row = Unsqueeze (x, axis)
  rows = Tile (row, two)
  present = Concat <axis = 2> (past, rows)
  y = Neg (x)
  twice = Identity (half)
}
"""


def saved(text: str, folder: Path) -> Path:
    file = folder / "graph.onnx"
    onnx.save(onnx.parser.parse_model(text), file)
    return file


@pytest.fixture
def session(tmp_path: Path) -> OnnxRuntime:
    return OnnxRuntime(saved(GRAPH, tmp_path))


def feeds(batch: int = 2, past: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "past": random.normal(size=(batch, 2, past, 4)).astype(np.float32),
        "x": random.normal(size=(batch, 3, 4)).astype(np.float32),
        "half": np.array([1.5, -2.0, 3.25], np.float32),
    }


def test_ports_say_what_a_graph_takes(session: OnnxRuntime) -> None:
    assert session.inputs["past"].shape == ("B", 2, "P", 4)
    assert session.inputs["half"].dtype == "bfloat16"
    assert list(session.outputs) == ["present", "y", "twice"]


def test_resident_values_stay_and_come_back(session: OnnxRuntime) -> None:
    first = session.run(feeds(), resident=["present"])
    assert isinstance(first["present"], Resident)
    assert first["present"].shape == (2, 2, 3, 4)
    second = session.run(feeds() | {"past": first["present"]}, ["present"])
    x = feeds()["x"]
    expected = np.concatenate([np.stack([x, x], 1)] * 2, axis=2)
    assert (second["present"] == expected).all()
    assert list(second) == ["present"]


def test_a_dead_input_does_not_spoil_what_stays(session: OnnxRuntime) -> None:
    kept = [session.run(feeds(), ["present"], resident=["present"])["present"] for _ in range(20)]
    x = feeds()["x"]
    for value in kept:
        result = session.run(feeds() | {"past": value}, ["present"])["present"]
        assert (np.asarray(result)[:, 0, :3] == x).all()


def test_bfloat16_goes_in_and_comes_out(session: OnnxRuntime) -> None:
    result = session.run(feeds(), ["twice"])["twice"]
    assert isinstance(result, np.ndarray)
    assert result.dtype == np.float32
    assert (result == feeds()["half"].astype(ml_dtypes.bfloat16).astype(np.float32)).all()
    empty = session.run(feeds() | {"half": np.zeros(0, np.float32)}, ["twice"])["twice"]
    assert empty.shape == (0,)


def test_arrays_are_cast_to_what_the_graph_takes(session: OnnxRuntime) -> None:
    result = session.run(feeds() | {"x": np.ones((2, 3, 4), np.float64)[:, ::-1]}, ["y"])["y"]
    assert (np.asarray(result) == -1).all()


def test_a_device_that_is_not_there_is_never_replaced(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is here: only a machine without it can refuse it")
    with pytest.raises(UnavailableError, match="CUDAExecutionProvider") as caught:
        open_session(saved(GRAPH, tmp_path), device="cuda")
    assert "pip uninstall -y onnxruntime && pip install 'vtr-export[gpu]'" in caught.value.hint


def test_a_provider_that_does_not_start_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FallenBack:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def disable_fallback(self) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FallenBack)
    with pytest.raises(UnavailableError, match="could not start CUDAExecutionProvider") as caught:
        open_session(saved(GRAPH, tmp_path), device="cuda")
    assert "vtr doctor" in caught.value.hint


def test_without_onnxruntime_the_command_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for device, extra in [("cpu", "cpu"), ("cuda", "gpu")]:
        with pytest.raises(UnavailableError, match="not installed") as caught:
            open_session(tmp_path / "graph.onnx", device=device)
        assert caught.value.hint == f"pip install 'vtr-export[{extra}]'"


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tpu"):
        open_session(tmp_path / "graph.onnx", device="tpu")
    with pytest.raises(InputError, match="threads"):
        open_session(tmp_path / "graph.onnx", threads=0)


def test_graphs_that_do_not_open(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        open_session(tmp_path / "graph.onnx")
    (tmp_path / "graph.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match="does not open the graph"):
        open_session(tmp_path / "graph.onnx")
    newer = GRAPH.replace('"": 21', '"": 99')
    with pytest.raises(ArtifactError, match="does not open the graph"):
        open_session(saved(newer, tmp_path))


def test_threads_are_passed_on(tmp_path: Path) -> None:
    session = OnnxRuntime(saved(GRAPH, tmp_path), threads=1)
    assert session._session.get_session_options().intra_op_num_threads == 1


def linked(folder: Path) -> tuple[Path, dict[str, Path], np.ndarray]:
    """A graph whose weight lies at an odd offset of a file in another folder."""
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    tensor = numpy_helper.from_array(weight, "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in [
        ("location", "a.safetensors"),
        ("offset", "13"),
        ("length", str(weight.nbytes)),
    ]:
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size])
        for name, size in [("x", 4), ("y", 3)]
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [tensor]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    shards = folder / "checkpoint"
    shards.mkdir()
    (shards / "a.safetensors").write_bytes(b"h" * 13 + weight.tobytes())
    (shards / "b.safetensors").write_bytes(b"not used by this graph")
    return folder / "graph.onnx", {file.name: file for file in sorted(shards.iterdir())}, weight


def test_linked_weights_are_found_where_the_manifest_says(tmp_path: Path) -> None:
    file, shards, weight = linked(tmp_path)
    session = open_session(file, shards=shards)
    x = np.eye(4, dtype=np.float32)
    assert (np.asarray(session.run({"x": x})["y"]) == weight).all()


def test_linked_weights_are_copied_while_opening(tmp_path: Path) -> None:
    file, shards, weight = linked(tmp_path)
    session = open_session(file, shards=shards)
    for shard in shards.values():
        shard.write_bytes(b"x" * shard.stat().st_size)
    assert (np.asarray(session.run({"x": np.eye(4, dtype=np.float32)})["y"]) == weight).all()


def test_linked_weights_that_end_early_are_refused(tmp_path: Path) -> None:
    file, shards, _ = linked(tmp_path)
    whole = shards["a.safetensors"].read_bytes()
    shards["a.safetensors"].write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match="does not open"):
        open_session(file, shards=shards)
