"""torch modules with fake weights to onnx_ir graphs with named inputs, outputs and dimensions."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Module
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from vtr_export.errors import CheckpointError

OPSET = 24
DynamicShapes = Any
HARMLESS: Final = frozenset(  # what an attention may be given without being another attention
    (
        *("dropout", "training", "use_cache", "logits_to_keep", "return_dict", "layer_idx"),
        *("position_ids", "cache_position", "position_embeddings"),  # spent when it is called
        *("sliding_window", "local_attention"),  # a context ends where they begin to count
        *("is_causal", "head_mask", "target_dtype", "use_top_left_mask"),
        *("grid_thw", "image_grid_thw", "cu_seqlens", "max_seqlen", "deterministic"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),  # kernels without mask
        "vision_feature_layer",  # who calls the tower picks it from the states
    )
)


def attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """One ONNX ``Attention`` node. query [B,H,S,d], key and value [B,kv_heads,T,d].

    CheckpointError for a term that such a node has not (sinks, a bias, chosen blocks).
    """
    _refuse(module, attention_mask, others)
    if value.shape[-1] != key.shape[-1]:
        return _narrow(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None
    output = torch.onnx.ops.attention(
        query, key, value, attention_mask, scale=scaling, softcap=softcap or 0.0
    )[0]
    return output.transpose(1, 2), None


def _narrow(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """The same where values are not as wide as keys, which torch's own form cannot be."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, mask),
        {"scale": scale, "softcap": softcap or 0.0},
        dtype=query.dtype,
        shape=(*query.shape[:-1], value.shape[-1]),
    )


AttentionInterface.register("vtr", attention)
AttentionMaskInterface.register("vtr", sdpa_mask)  # of encoders; the decoder's is given


def _refuse(module: Module, mask: Tensor | None, others: Mapping[str, object]) -> None:
    """What would be lost without a word."""
    foreign = [
        name
        for name, value in others.items()
        if value is not None
        and value is not False
        and name not in HARMLESS
        and not name.startswith("output_")
    ]
    if mask is None and others.get("is_causal") is True:
        foreign.append("is_causal")
    if foreign:
        raise CheckpointError(
            f"the attention of {type(module).__name__} takes {foreign[0]!r}, "
            "which no ONNX Attention has",
            hint="this architecture cannot be exported; report it with its config.json",
        )


@contextmanager
def _quiet() -> Any:
    """Silence torch's exporter about wheels and deprecations that do not concern a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def trace(
    module: Module,
    args: Sequence[Any],
    dynamic_shapes: DynamicShapes,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dimensions: Mapping[str, tuple[str, int]],
) -> ir.Model:
    """``module`` as ONNX; its initializers have names and shapes, and no data yet.

    ``dimensions`` names symbolic dimensions: name → (input or output, axis) that has it.
    """
    with _quiet():
        program = torch.export.export(
            module, tuple(args), dynamic_shapes=dynamic_shapes, strict=False
        )
        exported = torch.onnx.export(program, optimize=False, opset_version=OPSET, verbose=False)
    assert exported is not None
    model = exported.model
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
    for value in model.graph.initializers.values():
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, FakeTensor):
            value.const_value = None
    _name_dimensions(model, dimensions)
    return model


def _name_dimensions(model: ir.Model, dimensions: Mapping[str, tuple[str, int]]) -> None:
    """Replace torch's symbols (``s26``) by ``dimensions``' names in every shape."""
    signature = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    names: dict[str, str] = {}
    for name, (source, axis) in dimensions.items():
        shape = signature[source].shape
        assert shape is not None
        names[str(shape[axis])] = name
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    text = str(dim)
    return names.get(text, text if text != "?" else None)


def _values(graph: ir.Graph) -> Sequence[ir.Value]:
    produced = [value for node in graph for value in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *produced]
