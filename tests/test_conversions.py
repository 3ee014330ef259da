"""Stored tensors in another order or in parts: read as transformers would have loaded them."""

from importlib import import_module as load
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from test_weights import checkpoint, graph, stored
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Conv3dToLinear,
    Interleave,
    LinearToConv3d,
    MergeModulelist,
    PermuteForRope,
    Transpose,
    WeightConverter,
)

from vtr_export import runs
from vtr_export.checkpoint import Checkpoint, TensorRef
from vtr_export.errors import CheckpointError
from vtr_export.frontends.conversions import StandIn, converted
from vtr_export.frontends.parts import Parts, Stored
from vtr_export.frontends.skeleton import build_skeleton, name_tensors, read_config
from vtr_export.frontends.views import UnfollowedError, View
from vtr_export.weights import CheckpointTensor, write_weights

ARCHITECTURES = ("aria", "cosmos3_edge", "glm4v_moe", "molmo2", "muse_spark", "step3p7")


def read(tensor: Stored) -> np.ndarray:
    """What a session would see."""
    if isinstance(tensor, Parts):
        return np.concatenate([read(p) for p in tensor.parts], tensor.axis).reshape(tensor.shape)
    return CheckpointTensor(tensor, name="one", dtype=ir.DataType.FLOAT).numpy()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "shieldgemma2"])
def test_every_parameter_is_what_the_saved_model_held(
    bench: None, tmp_path: Path, architecture: str
) -> None:
    model = load("coverage_one")._tiny(architecture)
    model.save_pretrained(tmp_path)
    opened = Checkpoint.open(tmp_path)
    skeleton = build_skeleton(read_config(opened), torch.float32, FakeTensorMode())
    found = name_tensors(skeleton, opened)
    held = model.model if architecture == "shieldgemma2" else model
    for name, expected in held.named_parameters(remove_duplicate=False):
        assert np.array_equal(read(found[name]), expected.detach().numpy()), name


class Model(torch.nn.Module):
    """Asked by conversions for its heads and the shapes of its parameters."""

    base_model_prefix = "model"

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.config = type("Config", (), {"num_attention_heads": 2})()
        for name, shape in shapes.items():
            self.register_module(name, torch.nn.Module())
            getattr(self, name).weight = torch.nn.Parameter(torch.empty(shape))


ONE, PAIR = ["a.weight"], ["a.weight", "b.weight"]
EXPERTS = ["e.*.a.weight", "e.*.b.weight"]


@pytest.mark.parametrize(
    ("sources", "targets", "steps"),
    [
        (ONE, PAIR, [Chunk(0)]),
        (ONE, PAIR, [Chunk(1)]),
        (ONE, PAIR, [Interleave(0), Chunk(0)]),
        (ONE, PAIR, [Interleave(1), Chunk(1)]),
        (ONE, PAIR, [Chunk(0), PermuteForRope(permute_layer_names=["a"])]),
        (ONE, ["b.weight"], [PermuteForRope(inverse=True)]),
        (ONE, ["b.weight"], [Transpose(0, 1)]),
        (ONE, ["b.weight"], [LinearToConv3d(2, (1, 2, 4))]),
        (ONE, ["b.weight"], [LinearToConv3d(2, (1, 2, 4)), Conv3dToLinear(2, (1, 2, 4))]),
        (PAIR, ["c.weight"], [Concatenate(0)]),
        (PAIR, ["c.weight"], [Concatenate(1)]),
        (PAIR, ["c.weight"], [PermuteForRope(), Concatenate(0)]),
        (EXPERTS, ["c.weight"], [MergeModulelist(0), Concatenate(1)]),
        (EXPERTS[:1], ["c.weight"], [MergeModulelist(0)]),
    ],
    ids=str,
)
def test_a_conversion_is_transformers_own(
    tmp_path: Path, sources: list[str], targets: list[str], steps: list
) -> None:
    names = [n.replace("*", str(e)) for n in sources for e in range(3 if "*" in n else 1)]
    noise = np.random.default_rng(1)
    arrays = {name: noise.normal(size=(8, 16)).astype(np.float32) for name in names}
    real = WeightConverter([*sources], [*targets], operations=steps)
    for name, values in arrays.items():
        pattern = next(s for s in sources if s.split(".")[-2] == name.split(".")[-2])
        real.collected_tensors[pattern].append(torch.from_numpy(values))
    first = targets[0]
    model = Model(**dict.fromkeys((name.partition(".")[0] for name in targets), (8, 16)))
    expected = real.convert(first, model=model, config=model.config)
    own = WeightConverter([*sources], [*targets], operations=steps)
    found = converted(model, [own], checkpoint(tmp_path, arrays))
    assert set(found) == set(targets) == set(expected)
    for name, values in expected.items():
        values = values[0] if isinstance(values, list) else values
        assert np.array_equal(read(found[name]), values.numpy()), name


def test_an_expert_that_is_missing_is_told(tmp_path: Path) -> None:
    converter = WeightConverter(EXPERTS[:1], ["c.weight"], operations=[MergeModulelist(0)])
    arrays = {f"e.{n}.a.weight": np.ones((2, 2), np.float32) for n in (0, 2)}
    with pytest.raises(CheckpointError, match="missing"):
        converted(Model(c=(2, 2, 2)), [converter], checkpoint(tmp_path, arrays))


def test_what_computes_is_refused(tmp_path: Path) -> None:
    class Halved(Transpose):
        def convert(self, input_dict: dict, *_: object, **__: object) -> dict:
            return {"b.weight": next(iter(input_dict.values()))[0] / 2}

    converter = WeightConverter(ONE, ["b.weight"], operations=[Halved()])
    arrays = {"a.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(CheckpointError, match="computes parameters from"):
        converted(Model(b=(2, 2)), [converter], checkpoint(tmp_path, arrays))


@pytest.mark.parametrize("short", [0, 1 << 20])
def test_views_are_numpys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: int) -> None:
    """Random steps, each read in runs and in one piece, and written as float16."""
    monkeypatch.setattr(runs, "SHORT_BYTES", short)
    noise, followed = np.random.default_rng(2), 0
    values = noise.normal(size=(4, 6, 8)).astype(np.float32)
    view_of = View.of(checkpoint(tmp_path, {"x": values})["x"])
    tensors, expected = [], []
    for number in range(60):
        view, array = view_of, values
        try:
            for _ in range(4):
                view, array = step(noise, view, array)
        except UnfollowedError:
            continue
        followed += 1
        assert view.shape == array.shape
        assert np.array_equal(read(view.stored()), array)
        tensors.append(CheckpointTensor(view.stored(), name=str(number), dtype=ir.DataType.FLOAT16))
        expected.append(array)
    assert followed > 40
    model = graph(*tensors)
    write_weights({"g": model}, tmp_path)
    for tensor, array in zip(tensors, expected, strict=True):
        assert np.array_equal(stored(model, tensor.name).numpy(), array.astype(np.float16))


def step(noise: np.random.Generator, view: View, array: np.ndarray) -> tuple[View, np.ndarray]:
    kind, axis = noise.integers(3), int(noise.integers(array.ndim))
    if kind == 0:
        other = int(noise.integers(array.ndim))
        return view.transpose(axis, other), array.swapaxes(axis, other)
    if kind == 1:
        length = array.shape[axis] // 2 or 1
        start = int(noise.integers(array.shape[axis] - length + 1))
        return view.narrow(axis, start, length), array.take(range(start, start + length), axis)
    shapes = [(array.size,), (-1, 2), (2, -1, 2)] if not array.size % 4 else [(array.size,)]
    shape = shapes[noise.integers(len(shapes))]
    return view.reshape(shape), array.reshape(shape)


def test_a_stand_in_says_no_more_than_its_shape() -> None:
    tensor = StandIn(View.of(TensorRef("x", Path("x"), "F32", (2, 3), 0, 24)))
    assert (tensor.shape, tensor.ndim) == ((2, 3), 2)
    with pytest.raises(UnfollowedError):
        tensor + 1
