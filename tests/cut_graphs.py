"""Tiny models traced once, cut in many ways, and sessions that carry what a call leaves behind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from tiny_models import save_checkpoint, tiny_llava

from vtr_export import compile as compiler
from vtr_export.checkpoint import Checkpoint
from vtr_export.families import ModelFacts, read_facts
from vtr_export.frontends.transformers import Graphs, load
from vtr_export.schedule import Cut, Keep, Resolved

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"text": "qwen2", "layers": 3, "tied": True},
    "four_tokens": {  # an image
        "text": "mistral",
        "tower": "siglip",
        "image": 14,
        "hidden": 16,
        "heads": 2,
        "kv_heads": 1,
        "layers": 3,
    },
    "fp16": {"hidden": 64, "layers": 3, "tied": True, "dtype": torch.float16},
}
DTYPES = {torch.float32: "fp32", torch.float16: "fp16"}


@dataclass(frozen=True)
class Traced:
    """A model of transformers, and the graphs traced from its checkpoint."""

    model: Any
    facts: ModelFacts
    graphs: Graphs
    tokens: int  # an image

    def schedule(self, cuts: Mapping[int, int], **options: Any) -> Resolved:
        """Keep ``cuts[layer]`` tokens of each image from that layer on."""
        listed = tuple(Cut(layer, Keep(k, self.tokens)) for layer, k in cuts.items())
        return Resolved(self.facts.layers, self.tokens, listed, **options)

    def cut(self, schedule: Resolved, *, tunable: bool = False) -> ir.Model:
        """A decoder as an artifact with copied weights holds it."""
        passes = (
            *compiler.decoder(schedule, tunable=tunable),
            *compiler.copied(compiler.shared_weights(self.graphs)),
        )
        return compiler.run(passes, self.graphs.decoder.clone())


def trace(variant: str, folder: Path) -> Traced:
    """Save a tiny model of ``variant`` below ``folder`` and read it as the compiler does."""
    model = tiny_llava(**VARIANTS[variant])
    checkpoint = Checkpoint.open(save_checkpoint(model, folder / variant))
    facts = read_facts(checkpoint.config, variant)
    graphs = load(checkpoint, facts, DTYPES[model.dtype])
    return Traced(model, facts, graphs, model.config.image_seq_length)


Tracer = Callable[[str], Traced]


def serialized(model: ir.Model) -> bytes:
    """The checked model with its weights inside."""
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString())


class Client:
    """A loop that knows nothing of cuts: every ``present*`` goes to the ``past*`` of its name."""

    def __init__(self, model: ir.Model | bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        content = model if isinstance(model, bytes) else serialized(model)
        self.session = onnxruntime.InferenceSession(content, options)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.cache: dict[str, Array] = {}

    def forget(self) -> None:
        """Begin again."""
        self.cache = {}

    def __call__(self, **feeds: Array) -> dict[str, Array]:
        """Outputs of one call after those before."""
        batch = len(feeds["inputs_embeds"])
        cache = self.cache or {
            name: _empty(value, batch)
            for name, value in self.inputs.items()
            if name.startswith("past")
        }
        given = {name: array for name, array in feeds.items() if name in self.inputs}
        outputs = dict(zip(self.outputs, self.session.run(None, {**given, **cache}), strict=True))
        self.cache = {
            past: outputs[past.replace("past_key_values.", "present.").replace("past_", "present_")]
            for past in self.inputs
            if past.startswith("past")
        }
        return outputs


def _empty(value: Any, batch: int) -> Array:
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    shape = [batch, *(dim if isinstance(dim, int) else 0 for dim in value.shape[1:])]
    return np.zeros(shape, types[value.type])
