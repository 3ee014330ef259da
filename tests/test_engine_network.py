"""Each stage of one decoder engine runs on its own length: read from TensorRT's own network."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from cut_graphs import Traced, Tracer, serialized

from vtr_export.backends.tensorrt.library import environment
from vtr_export.passes.scale_queries import ScaleQueries

CHILD = Path(__file__).with_name("network_child.py")
WHEEL = "tensorrt_rtx_bindings"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(WHEEL) is None,
    reason=f"{WHEEL} is not installed: pip install 'vtr-export[rtx]' (x86-64 Linux)",
)
IMAGE, CUTS = 16, {1: 8, 3: 3}  # vision tokens of an image; of which each cut keeps so many
STAGE_OF_LAYER = (0, 1, 1, 2)
OPTIONS: dict[str, dict[str, Any]] = {
    "between": {},
    "inside": {"drop_point": "inside"},
    "next": {"source": "next", "positions": "repacked"},
}


@dataclass(frozen=True)
class Call:
    """One call's lengths. ``new`` and ``total`` of each stage were counted by hand."""

    batch: int
    sequence: int
    vision: int
    past: tuple[int, int, int]
    new: tuple[int, int, int]
    total: tuple[int, int, int]

    @property
    def dims(self) -> dict[str, int]:
        """What the graph calls the dimensions of its inputs."""
        past = {"past": self.past[0], "past_1": self.past[1], "past_2": self.past[2]}
        total = {"total": self.past[0] + self.sequence}
        own = {"batch": self.batch, "sequence": self.sequence, "vision": self.vision}
        return own | past | total


CALLS = {
    # 8 columns of text beside the image, of whose 16 tokens 8 and then 3 stay
    "prompt": Call(2, 24, 16, (0, 0, 0), (24, 16, 11), (24, 16, 11)),
    "two images": Call(1, 40, 32, (0, 0, 0), (40, 24, 14), (40, 24, 14)),
    "no image": Call(1, 9, 0, (0, 0, 0), (9, 9, 9), (9, 9, 9)),
    "generation": Call(2, 1, 0, (24, 16, 11), (1, 1, 1), (25, 17, 12)),
    "later turn": Call(1, 5, 0, (25, 17, 12), (5, 5, 5), (30, 22, 17)),
    "later image": Call(1, 20, 16, (25, 17, 12), (20, 12, 7), (45, 29, 19)),
}


def fixed(model: ir.Model, dims: Mapping[str, int]) -> ir.Model:
    """``model`` for calls of one shape only."""
    model = model.clone()
    for value in model.graph.inputs:
        assert value.shape is not None
        value.shape = ir.Shape(
            [d if isinstance(d, int) else dims[str(d.value)] for d in value.shape]
        )
    for value in (value for node in model.graph for value in node.outputs):
        if value.shape is not None:  # what was said of any length
            value.shape = ir.Shape([d if isinstance(d, int) else None for d in value.shape])
    return model


def parsed(models: Mapping[str, ir.Model | bytes], folder: Path, **profiles: Any) -> dict[str, Any]:
    """What TensorRT's networks of ``models`` hold."""
    files = []
    for number, (name, model) in enumerate(models.items()):
        files.append(folder / f"{number}.onnx")
        files[-1].write_bytes(model if isinstance(model, bytes) else serialized(model))
        if name in profiles:
            files[-1].with_suffix(".json").write_text(json.dumps(profiles[name]))
    variables = dict(os.environ) | dict(environment(folder))
    command = [sys.executable, CHILD, *files]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=variables
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(models, found, strict=True))


def cut(tiny: Traced, option: str = "between") -> ir.Model:
    return tiny.cut(tiny.schedule(CUTS, **OPTIONS[option]))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_attention_reads_as_many_tokens_as_its_stage_has(
    option: str, traced: Tracer, tmp_path: Path
) -> None:
    """In a prompt, a later turn and generation; without vision tokens cuts change no length."""
    tiny = traced("llama")
    assert (tiny.tokens, tiny.facts.layers) == (IMAGE, len(STAGE_OF_LAYER))
    model = cut(tiny, option)
    heads, kv_heads, width = tiny.facts.heads, tiny.facts.kv_heads, tiny.facts.head_dim
    networks = parsed({name: fixed(model, call.dims) for name, call in CALLS.items()}, tmp_path)
    for name, call in CALLS.items():
        assert networks[name]["errors"] == [], name
        outputs = networks[name]["outputs"]
        assert len(networks[name]["attentions"]) == len(STAGE_OF_LAYER)
        for layer, (stage, shapes) in enumerate(
            zip(STAGE_OF_LAYER, networks[name]["attentions"], strict=True)
        ):
            new, total = call.new[stage], call.total[stage]
            keys = [call.batch, kv_heads, total, width]
            assert shapes["query"] == [call.batch, heads, new, width], (name, layer)
            assert shapes["keys"] == shapes["values"] == keys, (name, layer)
            assert shapes["mask"] == [call.batch, 1, new, total], (name, layer)
            assert outputs[f"present.{layer}.key"] == keys
        for number in range(len(CUTS)):
            assert outputs[f"present_mask.{number}"] == [call.batch, call.total[number + 1]]
            assert outputs[f"kept.{number}"] == [call.batch, call.new[number + 1]]
        assert outputs["logits"] == [call.batch, 1, tiny.facts.vocab]


def test_an_uncut_decoder_runs_on_one_length(traced: Tracer, tmp_path: Path) -> None:
    """What the lengths above would be, were nothing dropped."""
    tiny = traced("llama")
    model = fixed(tiny.cut(tiny.schedule({})), CALLS["prompt"].dims)
    found = parsed({"whole": model}, tmp_path)["whole"]
    assert {shapes["query"][2] for shapes in found["attentions"]} == {24}
    assert {shapes["keys"][2] for shapes in found["attentions"]} == {24}


def bounds(model: ir.Model, kind: Mapping[str, tuple[int, int, int]]) -> dict[str, Any]:
    """Least, best and most of every input."""
    found = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        dims = [(d,) * 3 if isinstance(d, int) else kind[str(d.value)] for d in value.shape]
        found[str(value.name)] = [list(bound) for bound in zip(*dims, strict=True)]
    return found


def profile(
    sequence: tuple[int, int, int], vision: tuple[int, int, int], pasts: tuple[int, int, int]
) -> dict[str, tuple[int, int, int]]:
    """Stages with pasts of their own."""
    stages = {"past": pasts, "past_1": (pasts[0], 16, pasts[2]), "past_2": (pasts[0], 11, pasts[2])}
    least, best, most = (a + b for a, b in zip(sequence, pasts, strict=True))
    own = {"batch": (1, 1, 2), "sequence": sequence, "vision": vision}
    return own | stages | {"total": (least, best, most)}


def test_one_network_takes_both_profiles(traced: Tracer, tmp_path: Path) -> None:
    """Lengths are open in every stage, and every weight is there once for both."""
    tiny = traced("llama")
    model = cut(tiny)
    context = bounds(model, profile((1, 24, 40), (0, 16, 32), (0, 24, 64)))
    generation = bounds(model, profile((1, 1, 1), (0, 0, 0), (1, 24, 127)))
    backwards = generation | {"vision_index": [[1, 4], [1, 2], [1, 0]]}
    found = parsed({"both": model}, tmp_path, both=[context, generation, backwards])["both"]
    assert found["profiles"] == [0, 1, -1]
    for shapes in found["attentions"]:
        assert [shapes["query"][2], shapes["keys"][2], shapes["mask"][2:]] == [-1, -1, [-1, -1]]
    weights = (value.const_value for value in model.graph.initializers.values())
    assert found["matrices"] == sum(len(w.shape) == 2 for w in weights if w is not None) > 20


def test_no_value_is_called_as_a_constant_of_an_operator(traced: Tracer) -> None:
    """TensorRT's parser would take one for the other, and say nothing."""
    for option in OPTIONS:
        model = cut(traced("llama"), option)
        inner = {
            value.name
            for function in model.functions.values()
            for node in function
            if node.op_type == "Constant"
            for value in node.outputs
        }
        outer = {value.name for node in model.graph for value in node.outputs}
        assert inner >= {"VtrScore.one", "VtrSelect.zero"}
        assert not inner & (outer | set(model.graph.initializers))


def test_every_attention_of_a_decoder_can_scale_its_query(traced: Tracer) -> None:
    """Its type and width are known, with every kind of cut."""
    for option in OPTIONS:
        model = cut(traced("llama"), option)
        assert ScaleQueries()(model).modified
        scales = [n.attributes["scale"] for n in model.graph if n.op_type == "Attention"]
        assert [scale.as_float() for scale in scales] == [1.0] * len(STAGE_OF_LAYER)
