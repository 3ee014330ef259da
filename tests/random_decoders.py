"""Random decoders: every choice follows from one integer seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from decoder_writer import Builder, Weights
from onnx_ir.passes.common import ShapeInferencePass

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Decoder:
    """What a decoder is made of; ``choices`` of each field are what a seed draws from."""

    layers: int = 2
    width: int = 8
    kv_heads: int = 1
    group: int = 1
    head_width: int = 4
    value_width: int = 4
    vocabulary: int = 5
    opset: Literal[23, 24] = 24
    fp16: bool = False
    qkv: Literal["separate", "split", "sliced"] = "separate"
    bias: bool = False
    norm: Literal["rms", "rms_parts", "rms_root", "plus_one", "layer"] = "rms"
    arrangement: Literal["pre", "post", "sandwich", "outer"] = "pre"
    parallel: bool = False
    mlp: Literal["tanh", "gelu", "gated", "fused_gate", "none"] = "tanh"
    qk_norm: Literal["none", "rows", "heads"] = "none"
    rope: Literal["none", "halves", "interleaved"] = "halves"
    partial: bool = False
    rope_form: Literal["op", "op_flat", "op_cached", "parts", "parts_rows"] = "op"
    positions: Literal["plain", "mrope_early", "mrope_late"] = "plain"
    tables: Literal["computed", "given", "looked_up", "each_layer"] = "computed"
    absolute: bool = False
    planes: int = 0
    stacked_planes: bool = False
    scaled: bool = False
    stand_in: bool = False
    logits: Literal["last", "gathered", "all"] = "last"
    multiplier: bool = False
    output_gate: bool = False
    constants: Literal["nodes", "initializers"] = "nodes"
    softcap: bool = False
    grouped: bool = False  # tokens of a group see each other

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def rotated(self) -> int:
        """Features of a head that positions turn."""
        whole = self.head_width
        return 0 if self.rope == "none" else whole // 2 if self.partial else whole

    @property
    def sections(self) -> tuple[int, ...]:
        """Frequencies that each of three position components turns."""
        half = self.rotated // 2
        first = half // 3 + half % 3
        return (first, half // 3, half // 3)

    @property
    def scale(self) -> float:
        return 0.4 if self.scaled else self.head_width**-0.5

    @property
    def is_mrope(self) -> bool:
        return self.positions != "plain"

    @property
    def dtype(self) -> Any:
        return np.float16 if self.fp16 else np.float32


CHOICES: Mapping[str, Sequence[Any]] = {
    "layers": (2, 2, 3, 3, 4, 5),
    "width": (6, 8, 12),
    "kv_heads": (1, 1, 2, 3),
    "group": (1, 2, 3),
    "head_width": (4, 8, 12),
    "value_width": (0, 0, 0, 3),
    "opset": (23, 24),
    "fp16": (False, False, False, True),
    "qkv": ("separate", "split", "sliced"),
    "bias": (False, True),
    "norm": ("rms", "rms_parts", "rms_root", "plus_one", "layer"),
    "arrangement": ("pre", "pre", "post", "sandwich", "outer"),
    "parallel": (False, False, True),
    "mlp": ("tanh", "gelu", "gated", "fused_gate", "none"),
    "qk_norm": ("none", "rows", "heads"),
    "rope": ("halves", "halves", "interleaved", "none"),
    "partial": (False, False, True),
    "rope_form": ("op", "op_flat", "op_cached", "parts", "parts_rows"),
    "positions": ("plain", "plain", "mrope_early", "mrope_late"),
    "tables": ("computed", "computed", "given", "looked_up", "each_layer"),
    "absolute": (False, False, True),
    "planes": (0, 0, 1, 2),
    "stacked_planes": (False, True),
    "scaled": (False, True),
    "stand_in": (False, True),
    "logits": ("last", "gathered", "all"),
    "multiplier": (False, False, True),
    "output_gate": (False, False, True),
    "constants": ("nodes", "initializers"),
    "softcap": (False, False, True),
    "grouped": (False, False, True),
}


def drawn(rng: np.random.Generator) -> Decoder:
    """A decoder whose parts fit together."""
    found = {name: few[int(rng.integers(len(few)))] for name, few in CHOICES.items()}
    found["value_width"] = found["value_width"] or found["head_width"]
    if found["fp16"]:  # rounding that grows from layer to layer is not what is tested
        found["layers"] = min(found["layers"], 3)
    if found["grouped"]:
        found["stand_in"] = False
    if found["rope"] == "none":
        found |= {"positions": "plain", "tables": "computed", "rope_form": "op", "partial": False}
    if found["rope_form"] == "op_cached" and (found["positions"] != "plain"):
        found["rope_form"] = "op"
    if found["rope_form"] == "op_cached":
        found["tables"] = "looked_up"
    if found["positions"] != "plain":
        found["absolute"] = False
        found["tables"] = "each_layer" if found["tables"] == "each_layer" else "computed"
    if found["tables"] == "given":
        found["absolute"] = False
    return Decoder(**found)


@dataclass
class Random:
    """Small random weights, each from its own name; ``arrays`` holds what was asked for."""

    seed: int
    dtype: Any = np.float32
    arrays: dict[str, Array] = field(default_factory=dict)

    def __call__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> ir.Tensor:
        for name, shape in zip(names, shapes, strict=True):
            if name not in self.arrays:
                rng = np.random.default_rng([self.seed, *name.encode()])
                self.arrays[name] = (0.6 * rng.normal(size=shape)).astype(self.dtype)
        return ir.tensor(np.concatenate([self.arrays[name] for name in names], -1), name=names[0])


def build(decoder: Decoder, weights: Weights) -> ir.Model:
    """The graph of ``decoder`` with its weights inside."""
    model = Builder(decoder, weights).model()
    ShapeInferencePass()(model)
    return model
