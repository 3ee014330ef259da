"""The plugin behind ``vtr::VtrTopKPrune`` in Python: builds anywhere, runs with cuda-python.

Executed on no GPU yet: parsing and building have been, ``enqueue`` has not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np

from vtr_export.backends.tensorrt import kernel
from vtr_export.errors import EngineError
from vtr_export.ops.prune import FIELDS, INPUTS, OUTPUTS, PLUGIN_NAMESPACE, PLUGIN_VERSION, PRUNE
from vtr_export.ops.prune import SHAPE_INPUTS as _SHAPE_INPUTS

# TensorRT hands a shape input to get_output_shapes only: elsewhere the others move up
PORTS: Final = tuple(name for i, name in enumerate(INPUTS) if i not in _SHAPE_INPUTS)
QUERY, KEYS, MASK, VISION_INDEX, BUDGET, HIDDEN = range(len(PORTS))
KEPT_HIDDEN, INDICES, KEPT_VISION_INDEX = range(len(OUTPUTS))
SERVED: Final = {
    "query": ("last", "text"),
    "heads": ("mean", "max"),
    "rank": ("joint", "per_image"),
}
DTYPES: Final[dict[str, kernel.Dtype]] = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}

Dims = Sequence[int]


@dataclass(frozen=True)
class Fields:
    """What a node says of its cut, and a plan keeps."""

    scale: float
    query: kernel.Query
    heads: kernel.Heads
    rank: kernel.Rank

    @classmethod
    def read(cls, collection: Any) -> "Fields":
        """Raises EngineError for a field that is missing, and for a choice no kernel has."""
        data = {field.name: field.data for field in collection}
        if missing := [name for name in FIELDS if name not in data]:
            raise EngineError(
                f"the node of {PRUNE} does not say its {', '.join(missing)}",
                hint="export the artifact again with this vtr-export",
            )
        words: dict[str, Any] = {
            name: bytes(data[name]).rstrip(b"\0").decode("ascii") for name in SERVED
        }
        for name, word in words.items():
            if why := refusal(name, word):
                raise EngineError(why, hint="build with --plugin off")
        return cls(float(data["scale"][0]), **words)

    def write(self, trt: Any) -> Any:
        """As the parser hands them over: a float, and text that ends with a zero."""
        kind = trt.PluginFieldType
        kinds = {"scale": kind.FLOAT32} | dict.fromkeys(SERVED, kind.CHAR)
        return trt.PluginFieldCollection(
            [trt.PluginField(name, array, kinds[name]) for name, array in _arrays(self).items()]
        )


@cache
def _arrays(fields: Fields) -> dict[str, Any]:
    """The data of each field, kept for ever: TensorRT holds its address, not the array."""
    texts = {name: f"{getattr(fields, name)}\0".encode("ascii") for name in SERVED}
    arrays = {name: np.frombuffer(text, np.int8) for name, text in texts.items()}
    return {"scale": np.array([fields.scale], np.float32), **arrays}


def refusal(name: str, word: str) -> str | None:
    """Why the kernel does not serve ``word`` for the field ``name``; None: it does."""
    if word in SERVED[name]:
        return None
    return f"the plugin does not serve {name}: {word}, only {', '.join(SERVED[name])}"


def shape_of(query: kernel.Query, inputs: Sequence[Dims], outputs: Sequence[Dims]) -> kernel.Shape:
    """What the kernel is told of the shapes of the plugin's inputs (without keep) and outputs."""
    batch, heads, query_rows, head_dim = inputs[QUERY]
    return kernel.Shape(
        batch=batch,
        heads=heads,
        kv_heads=inputs[KEYS][1],
        head_dim=head_dim,
        query_rows=query_rows,
        mask_rows=inputs[MASK][2],
        total=inputs[KEYS][2],
        new=inputs[HIDDEN][1],
        vision=inputs[VISION_INDEX][1],
        keep=outputs[KEPT_VISION_INDEX][1],
        hidden=inputs[HIDDEN][2],
        query=query,
    )


@cache
def classes(trt: Any) -> tuple[type, type]:
    """The plugin and its creator, of the flavour ``trt`` (its module)."""
    plugin = type(
        PRUNE,
        (
            _Plugin,
            trt.IPluginV3,
            trt.IPluginV3OneCore,
            trt.IPluginV3OneBuild,
            trt.IPluginV3OneRuntime,
        ),
        {"trt": trt},
    )
    creator = type(
        f"{PRUNE}Creator", (_Creator, trt.IPluginCreatorV3One), {"trt": trt, "plugin": plugin}
    )
    return plugin, creator


class _Plugin:
    """One cut of one network; the names of its methods are TensorRT's."""

    trt: Any

    def __init__(self, fields: Fields) -> None:
        trt = self.trt
        for base in (
            trt.IPluginV3,
            trt.IPluginV3OneCore,
            trt.IPluginV3OneBuild,
            trt.IPluginV3OneRuntime,
        ):
            base.__init__(self)
        self.plugin_name, self.num_outputs = PRUNE, len(OUTPUTS)
        self.plugin_namespace, self.plugin_version = PLUGIN_NAMESPACE, PLUGIN_VERSION
        self.fields = fields

    def clone(self) -> "_Plugin":
        return type(self)(self.fields)

    def attach_to_context(self, context: Any) -> "_Plugin":
        del context  # the kernel needs nothing of it
        return self.clone()

    def get_capability_interface(self, kind: Any) -> "_Plugin":
        del kind  # this object is all of them
        return self

    def get_fields_to_serialize(self) -> Any:
        return self.fields.write(self.trt)

    # --- build ---

    def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
        """Hidden states keep their type; indices are int64."""
        return [types[HIDDEN], self.trt.int64, self.trt.int64]

    def get_output_shapes(self, inputs: Sequence[Any], shapes: Sequence[Any], math: Any) -> Any:
        """``[B, S - V + keep, D]``, ``[B, S - V + keep]`` and ``[B, keep]``."""
        trt, keep = self.trt, shapes[0][0]
        batch, length, width = (inputs[HIDDEN][axis] for axis in range(3))
        operation = trt.DimensionOperation
        text = math.operation(operation.SUB, length, inputs[VISION_INDEX][1])
        kept = math.operation(operation.SUM, text, keep)
        return [
            trt.DimsExprs(dims) for dims in ([batch, kept, width], [batch, kept], [batch, keep])
        ]

    def supports_format_combination(self, at: int, tensors: Sequence[Any], inputs: int) -> bool:
        """Linear; query, keys and both hidden states in one of three types."""
        trt, one = self.trt, tensors[at].desc
        if one.format != trt.TensorFormat.LINEAR:
            return False
        if at == MASK:
            return bool(one.type == trt.bool)
        if at not in (QUERY, KEYS, HIDDEN, inputs + KEPT_HIDDEN):
            return bool(one.type == trt.int64)
        first = tensors[QUERY].desc.type
        return first in (trt.float32, trt.float16, trt.bfloat16) and bool(one.type == first)

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Nothing is chosen by shape; EngineError for heads that the kernel cannot hold."""
        if (width := inputs[QUERY].max[3]) > kernel.MOST_HEAD_DIM:
            raise EngineError(
                f"the plugin serves heads of at most {kernel.MOST_HEAD_DIM}, not of {width}",
                hint="build with --plugin off",
            )

    def get_valid_tactics(self) -> list[int]:
        """There is one way."""
        return []

    def set_tactic(self, tactic: int) -> None:
        """There is one way."""

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Bytes for the largest shapes of a profile."""
        most = ([tuple(tensor.max) for tensor in tensors] for tensors in (inputs, outputs))
        return kernel.workspace_bytes(shape_of(self.fields.query, *most))

    # --- run ---

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Nothing is chosen by shape."""

    def enqueue(
        self,
        input_types: Sequence[Any],
        output_types: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Queue the kernel; every pointer is one of the device."""
        shapes = (
            [tuple(tensor.dims) for tensor in tensors] for tensors in (input_types, output_types)
        )
        kernel.launcher().launch(
            shape_of(self.fields.query, *shapes),
            DTYPES[input_types[QUERY].type.name],
            self.fields.scale,
            self.fields.heads,
            self.fields.rank,
            kernel.Pointers(*inputs, *outputs),
            workspace,
            stream,
        )


class _Creator:
    """Makes the plugin for a node that is parsed, or for a plan that is loaded."""

    trt: Any
    plugin: type

    def __init__(self) -> None:
        trt, kind = self.trt, self.trt.PluginFieldType
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace = PRUNE, PLUGIN_NAMESPACE
        self.plugin_version = PLUGIN_VERSION
        nothing = np.array([])
        self.field_names = trt.PluginFieldCollection(
            [
                trt.PluginField(name, nothing, kind.FLOAT32 if name == "scale" else kind.CHAR)
                for name in FIELDS
            ]
        )

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
        """Raises EngineError for fields that the kernel cannot serve."""
        del name, phase  # a plan holds what a node says
        return self.plugin(Fields.read(fields))
