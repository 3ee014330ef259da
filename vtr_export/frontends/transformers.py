"""A checkpoint folder to three graphs, traced by transformers' own code on fake tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import Parameter, signature

import onnx_ir as ir
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.export import Dim
from torch.nn import Module
from transformers import DynamicCache, PreTrainedModel

from vtr_export.checkpoint import Checkpoint
from vtr_export.errors import CheckpointError
from vtr_export.families import ModelFacts
from vtr_export.frontends import cross, generic, layered
from vtr_export.frontends.beside import feeds_beside
from vtr_export.frontends.concrete import Concrete
from vtr_export.frontends.experts import open_experts
from vtr_export.frontends.families import idefics, kosmos
from vtr_export.frontends.feeds import Feed, VisionGraph
from vtr_export.frontends.flat import keep_rows
from vtr_export.frontends.heads import Heads
from vtr_export.frontends.latent import expand_early
from vtr_export.frontends.mrope import is_bent, straighten
from vtr_export.frontends.pairs import Pairs, hold_pairs
from vtr_export.frontends.parts import Parts, Stored
from vtr_export.frontends.remote import is_foreign
from vtr_export.frontends.shaped import Shaped
from vtr_export.frontends.skeleton import (
    DTYPES,
    build_skeleton,
    check_shapes,
    name_tensors,
    read_config,
)
from vtr_export.frontends.trace import trace
from vtr_export.frontends.uniform import Stack, truncated
from vtr_export.frontends.vision import VisionEncoder, vision_graph
from vtr_export.passes.add_planes import AddPlanes
from vtr_export.passes.fold_constants import FoldConstants
from vtr_export.passes.reduce_vision import TOWER
from vtr_export.passes.stamp_layers import StampLayers
from vtr_export.trained import PREFIX
from vtr_export.weights import CheckpointTensor, source_dtype

IR_DTYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}


@dataclass(frozen=True)
class Graphs:
    """The three parts of a VLM, each with lazy weights; ``held`` are those of no part, by name."""

    vision_encoder: ir.Model
    embed_tokens: ir.Model
    decoder: ir.Model
    held: Mapping[str, CheckpointTensor] = field(default_factory=dict)

    def parts(self) -> dict[str, ir.Model]:
        """File stem (the onnx-community layout) → graph."""
        return {
            "vision_encoder": self.vision_encoder,
            "embed_tokens": self.embed_tokens,
            "decoder_model_merged": self.decoder,
        }


class EmbedTokens(Module):
    """input_ids [B,S] → inputs_embeds [B,S,hidden]."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look the tokens up."""
        return layered.embedded(self.model, input_ids)


class Decoder(Module):
    """One call of the language model with a cache: the last position's logits, and the cache.

    ``masks`` are stand-ins of shape [1,1,1,1]; the graph's real ones are attached by a pass.
    ``groups`` below 0 are of tokens that have experts of their own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        taken = signature(type(speaker(model)).forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}

    def forward(
        self,
        inputs_embeds: Tensor,
        masks: list[Tensor],
        position_ids: Tensor,
        past: list[list[Tensor]],
        beside: Mapping[str, Tensor],
        groups: Tensor | None = None,
    ) -> list[Tensor]:
        """Logits [B,1,vocab] in fp32, then key and value of every layer."""
        marks = {} if groups is None else {"moe_mm_token_type_ids": groups < 0}
        cache = DynamicCache([(key, value) for key, value in past])
        with Concrete(), Shaped(), Heads(), Pairs():
            output = speaker(self.model)(
                **layered.spread(self.model, inputs_embeds),
                attention_mask=layered.of_kinds(masks),
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                **beside,
                **self._last,
                **marks,
            )
        logits = output.logits[:, -1:].float() if not self._last else output.logits.float()
        return [logits, *(part for layer in cache.layers for part in (layer.keys, layer.values))]


def speaker(model: PreTrainedModel) -> PreTrainedModel:
    """The model; the language model inside where its own forward never goes without an image."""
    if model.config.model_type == "kosmos-2":
        return model.text_model
    pixels = signature(type(model).forward).parameters.get("pixel_values")
    needs = pixels is not None and pixels.default is Parameter.empty
    return model.language_model if needs else model


def load(checkpoint: Checkpoint, facts: ModelFacts, dtype: str, *, whole: bool = False) -> Graphs:
    """Trace the checkpoint's model in ``dtype`` (fp32, fp16 or bf16); no weight is read.

    ``whole``: all layers of the vision tower, also those that feed nothing, for who reads them.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # constants, such as a grid
    trusted = bool(checkpoint.code)
    model = build_skeleton(read_config(checkpoint), DTYPES[dtype], mode, trusted=trusted)
    tensors = name_tensors(model, checkpoint)
    open_experts(model, tensors, mode)
    kosmos.follow(model)
    idefics.look_up(model)
    keep_rows(model)
    hold_pairs(model)
    expand_early(model)
    check_shapes(model, tensors)
    if facts.mrope and (not facts.estimated or is_bent(model.get_decoder())):
        straighten(model.get_decoder(), facts.sections)
    buffers = dict(model.named_buffers())
    with mode, truncated(model, vision=not whole) as stacks:
        graphs = Graphs(
            vision_encoder=_trace_vision(
                model, facts, DTYPES[dtype], stacks.vision if whole else None
            ),
            embed_tokens=_trace_embedding(model),
            decoder=_trace_decoder(model, facts, DTYPES[dtype]),
            held=_held(checkpoint),
        )
    for graph, stack in ((graphs.vision_encoder, stacks.vision), (graphs.decoder, stacks.text)):
        stamp(graph, stack)
    AddPlanes(facts.planes)(graphs.decoder)
    for graph in graphs.parts().values():
        _bind_weights(graph, buffers, tensors, IR_DTYPES[dtype])
    return graphs


def stamp(graph: ir.Model, stack: Stack) -> None:
    """Bring a graph traced with few layers to the model's depth."""
    if stack.is_truncated:
        for step in (
            FoldConstants(),
            CommonSubexpressionEliminationPass(),
            RemoveUnusedNodesPass(),
        ):
            step(graph)
        StampLayers(stack.layers, f"model.{stack.name}")(graph)


def _held(checkpoint: Checkpoint) -> dict[str, CheckpointTensor]:
    """Weights that only reductions read, as they are stored."""
    return {
        name: CheckpointTensor(ref, name=name, dtype=source_dtype(ref))
        for name, ref in checkpoint.tensors.items()
        if name.startswith(PREFIX)
    }


def _trace_vision(
    model: PreTrainedModel, facts: ModelFacts, dtype: torch.dtype, whole: Stack | None
) -> ir.Model:
    if facts.estimated:
        graph = _trace_accessor(model, dtype)
        if is_foreign(type(model)):
            _check_tokens(graph, facts)
        return graph
    encoder = vision_graph(facts)
    return _trace_encoder(model, encoder, encoder.feeds(facts, dtype), whole)


def _trace_accessor(model: PreTrainedModel, dtype: torch.dtype) -> ir.Model:
    """The first of the forms that torch.export follows; CheckpointError when it follows none."""
    with unset_fake_temporarily():
        forms = generic.taken(model, dtype)
    for last, form in zip((*[False] * (len(forms) - 1), True), forms, strict=True):
        graph = VisionGraph(partial(_accessed, form.constants), lambda *_: {})
        try:
            return _trace_encoder(model, graph, form.feeds)
        except Exception as error:  # torch.export's own have no common class
            if last:
                raise untraceable("vision encoder", model, error) from error
    raise AssertionError("there is a form")


def _check_tokens(graph: ir.Model, facts: ModelFacts) -> None:
    """CheckpointError where a foreign configuration counts other tokens than its model gives."""
    shape, wanted = graph.graph.outputs[0].shape, facts.tokens_per_image
    assert shape is not None, "torch.export gives shapes"
    if wanted is not None and isinstance(shape[-2], int) and shape[-2] != wanted:
        raise CheckpointError(
            f"config.json counts {wanted} tokens for an image, its model gives {shape[-2]}",
            hint=f'write "image_seq_length": {shape[-2]} into config.json',
        )


def _accessed(constants: Mapping[str, Tensor], model: PreTrainedModel, **feeds: Tensor) -> Tensor:
    return generic.encoded(model, constants, **feeds)


def untraceable(part: str, model: PreTrainedModel, error: Exception) -> CheckpointError:
    """What torch.export, or the model's own code under it, stumbled over; in one line."""
    if isinstance(error, CheckpointError):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return CheckpointError(
        f"the {part} of {model.config.model_type} cannot be traced: "
        f"{type(error).__name__}: {lines[0][:200] if lines else ''}",
        hint="this architecture cannot be exported; report it with its config.json",
    )


def _trace_encoder(
    model: PreTrainedModel,
    encoder: VisionGraph,
    feeds: Mapping[str, Feed],
    whole: Stack | None = None,
) -> ir.Model:
    last = None if whole is None else model.get_submodule(f"{whole.name}.{whole.layers - 1}")
    return trace(
        VisionEncoder(model, encoder, list(feeds), last),
        tuple(feed.example for feed in feeds.values()),
        (tuple(feed.dynamic for feed in feeds.values()),),
        inputs=list(feeds),
        outputs=["image_features", *([] if last is None else [TOWER])],
        dimensions={
            name: (feed_name, axis)
            for feed_name, feed in feeds.items()
            for axis, name in enumerate(feed.axes)
            if name is not None
        },
    )


def _trace_embedding(model: PreTrainedModel) -> ir.Model:
    return trace(
        EmbedTokens(model),
        (torch.zeros(2, 3, dtype=torch.long),),
        ({0: Dim("batch"), 1: Dim("sequence")},),
        inputs=["input_ids"],
        outputs=["inputs_embeds"],
        dimensions={"batch": ("input_ids", 0), "sequence": ("input_ids", 1)},
    )


def _trace_decoder(model: PreTrainedModel, facts: ModelFacts, dtype: torch.dtype) -> ir.Model:
    if not facts.estimated:
        return _traced_decoder(model, facts, dtype)
    try:
        return _traced_decoder(model, facts, dtype)
    except Exception as error:  # torch.export's own have no common class
        raise untraceable("decoder", model, error) from error


def _traced_decoder(model: PreTrainedModel, facts: ModelFacts, dtype: torch.dtype) -> ir.Model:
    if facts.crosses:
        return cross.trace_decoder(model, facts, dtype)
    batch, sequence, past = 2, 3, 5
    lead = (facts.sections,) if facts.mrope else ()
    dims = Dim("batch"), Dim("sequence"), Dim("past")
    layers, beside = len(model.get_decoder().layers), feeds_beside(facts, batch, dtype)
    kinds = _caches(model, facts, layers)
    shapes = [[(batch, heads, past, width) for width in widths] for heads, *widths in kinds]
    names = [f"{n}.{part}" for n in range(layers) for part in ("key", "value")]
    marks = ["token_groups"] if facts.marked else []
    masks = ["mask", *(["mask.causal"] if layered.has_two_masks(model, facts) else [])]
    decoder = trace(
        Decoder(model),
        (
            torch.empty(batch, sequence, facts.hidden + layered.beside(model), dtype=dtype),
            [torch.ones(1, 1, 1, 1, dtype=torch.bool) for _ in masks],
            torch.zeros((*lead, batch, sequence), dtype=torch.long),
            [[torch.empty(shape, dtype=dtype) for shape in layer] for layer in shapes],
            {name: feed.example for name, feed in beside.items()},
            *(torch.zeros(batch, sequence, dtype=torch.long) for _ in marks),
        ),
        (
            {0: dims[0], 1: dims[1]},
            [None for _ in masks],
            {len(lead): dims[0], len(lead) + 1: dims[1]},
            [[{0: dims[0], 2: dims[2]} for _ in range(2)] for _ in range(layers)],
            {name: feed.dynamic for name, feed in beside.items()},
            *({0: dims[0], 1: dims[1]} for _ in marks),
        ),
        inputs=[
            "inputs_embeds",
            *masks,
            "position_ids",
            *(f"past_key_values.{name}" for name in names),
            *beside,
            *marks,
        ],
        outputs=["logits", *(f"present.{name}" for name in names)],
        dimensions={
            "batch": ("inputs_embeds", 0),
            "sequence": ("inputs_embeds", 1),
            "past": ("past_key_values.0.key", 2),
            "total": ("present.0.key", 2),
            **{axis: (n, at) for n, f in beside.items() for at, axis in enumerate(f.axes) if axis},
        },
    )
    if facts.attends != "causal":
        groups = ir.val("token_groups", ir.DataType.INT64, ["batch", "sequence"])
        decoder.graph.inputs.append(groups)  # of the mask that is attached
    return decoder


def _caches(model: PreTrainedModel, facts: ModelFacts, layers: int) -> list[tuple[int, int, int]]:
    """Heads of keys in each layer, and how wide keys and values are."""
    each = getattr(model.get_decoder().config, "per_layer_attributes", None)
    if not each:
        return [(facts.kv_heads, facts.head_dim, facts.value_dim or facts.head_dim)] * layers
    configs = [model.get_decoder().config.per_layer_config[layer] for layer in range(layers)]
    widths = [getattr(config, "head_dim", facts.head_dim) for config in configs]
    heads = [config.num_key_value_heads for config in configs]
    return list(zip(heads, widths, widths, strict=True))


def _bind_weights(
    graph: ir.Model,
    buffers: Mapping[str, Tensor],
    tensors: Mapping[str, Stored],
    dtype: ir.DataType,
) -> None:
    """Give each used initializer its checkpoint tensor, or the buffer's values.

    Each as it was traced: some models keep a router's weights in fp32.
    """
    for name, value in list(graph.graph.initializers.items()):
        if not value.uses():
            graph.graph.initializers.pop(name)
            continue
        key = name.removeprefix("model.")
        if isinstance(ref := tensors.get(key), Parts):
            ref.build(graph.graph, value, value.dtype or dtype)
        elif key in buffers and ref is not None:  # a buffer that was saved
            value.const_value = CheckpointTensor(ref, name=name, dtype=value.dtype or dtype)
        elif key in buffers:
            value.const_value = ir.tensor(buffers[key].numpy(), name=name)
        elif value.const_value is None:
            assert ref is not None, f"{key} is no buffer"
            value.const_value = CheckpointTensor(ref, name=name, dtype=value.dtype or dtype)
