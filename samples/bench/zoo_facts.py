"""What a model's decoder does, seen in one call: attention, masks, positions, streams."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

PROBE = "probe"
MAX_ROUNDING = 1e-3  # of logits of unit size, fp32


@dataclass(frozen=True)
class Call:
    """One call of an attention function."""

    module: str
    query: torch.Size
    key: Tensor  # held: two layers that share keys are told by where the values lie
    value: torch.Size
    mask: Tensor | None
    options: dict[str, Any]  # what was given and is not None


@dataclass
class Seen:
    """All that was seen in one forward pass."""

    logits: Tensor
    calls: list[Call] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)  # the decoder's arguments that are not None


_calls: list[Call] = []
_names: dict[int, str] = {}


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention by its definition (softcap and sinks too), and a note of the call."""
    said = {name: one for name, one in options.items() if one is not None}
    where = _names.get(id(module), type(module).__name__)
    _calls.append(Call(where, query.shape, key, value.shape, attention_mask, said))
    repeat = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeat, dim=1) for part in (key, value))
    scores = query @ key.mT * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if (cap := said.get("softcap")) is not None:
        scores = torch.tanh(scores / cap) * cap
    if (bias := said.get("position_bias")) is not None:
        scores = scores + bias
    if attention_mask is not None:
        shape = attention_mask[..., : key.shape[-2]]
        scores = (
            scores.masked_fill(~shape, -math.inf) if shape.dtype == torch.bool else scores + shape
        )
    elif getattr(module, "is_causal", False) and query.shape[2] > 1 and said.get("is_causal", True):
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    if (sinks := said.get("s_aux", said.get("sinks"))) is not None:
        sinks = sinks if sinks.ndim == 4 else sinks.reshape(1, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.float().softmax(dim=-1).nan_to_num().to(value.dtype)[..., : key.shape[-2]]
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(PROBE, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, eager_mask)


def watch(model: PreTrainedModel, inputs: dict[str, Any]) -> Seen:
    """Run ``model`` with every attention call and the decoder's arguments noted."""
    _calls.clear()
    _names.clear()
    _names.update((id(module), name) for name, module in model.named_modules())
    given: dict[str, Any] = {}

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.update({name: one for name, one in kwargs.items() if one is not None})

    with _probing(model), torch.no_grad():
        hook = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        output = model(**inputs)
        hook.remove()
    return Seen(output.logits, list(_calls), given)


@contextmanager
def _probing(model: PreTrainedModel) -> Iterator[None]:
    model.set_attn_implementation(PROBE)
    try:
        yield
    finally:
        model.set_attn_implementation("eager")


def mask_kind(mask: Tensor | None) -> str:
    """``causal``, ``prefix`` (some keys ahead are seen), ``window``, ``full`` or ``none``."""
    if mask is None:
        return "none"
    seen = mask if mask.dtype == torch.bool else mask > -1e4
    seen = seen[0].flatten(0, -3).any(dim=0) if seen.ndim == 4 else seen[0]
    rows, columns = seen.shape
    causal = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    if bool(seen.all()):
        return "full"
    ahead, missing = bool((seen & ~causal).any()), bool((~seen & causal).any())
    return {(False, False): "causal", (True, False): "prefix", (False, True): "window",
            (True, True): "prefix window"}[ahead, missing]  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What a schedule must know of an architecture; dotted names, empty where there is none."""

    architecture: str
    model_class: str
    decoder: str
    layers: str
    attention: tuple[str, ...]  # inside a layer
    vision: str
    lm_head: str
    kind: str
    features: tuple[str, ...]
    streams: tuple[str, ...]  # tensors with a token axis that the decoder takes beside embeddings
    inputs: dict[str, tuple[int, ...]]


def observe(model: PreTrainedModel, architecture: str, inputs: dict[str, Any]) -> Facts:
    """Facts of ``model`` from its modules and from one call."""
    with torch.no_grad():
        expected = model(**inputs).logits
    seen = watch(model, inputs)
    names = {id(module): name for name, module in model.named_modules()}
    decoder = names[id(model.get_decoder())]
    own = [call for call in seen.calls if _inside(call.module, decoder)]
    layers = layer_list(model, decoder)
    vision = _name_of(model.get_encoder("image"), names)
    swapped = own and torch.allclose(seen.logits, expected, atol=MAX_ROUNDING)
    note = () if swapped else ("attention of its own",)
    return Facts(
        architecture,
        type(model).__name__,
        decoder,
        layers,
        tuple(dict.fromkeys(_place(call.module, layers) for call in own)),
        "" if decoder.startswith(vision) else vision,
        _name_of(model.get_output_embeddings(), names),
        _kind(model, inputs, seen.given, own),
        (*note, *_features(model, layers, own, seen.given)),
        _streams(seen.given, inputs),
        {name: tuple(value.shape) for name, value in inputs.items() if torch.is_tensor(value)},
    )


_ELSEWHERE = re.compile(r"vision|visual|image|protein|qformer|vqmodel|audio|tower")


def _inside(module: str, decoder: str) -> bool:
    return module.startswith(f"{decoder}.") and not _ELSEWHERE.search(module)


def _name_of(module: nn.Module | None, names: dict[int, str]) -> str:
    return names.get(id(module), "") if module is not None else ""


def _place(module: str, layers: str) -> str:
    """``self_attn`` of ``model.layers.3.self_attn``; whole where it is in another list."""
    inner = re.sub(r"\.\d+", ".N", module)
    return inner.removeprefix(f"{layers}.N.")


def layer_list(model: PreTrainedModel, decoder: str) -> str:
    """The decoder's list of layers: the outermost, the longest."""
    lists = [
        (name, len(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _inside(name, decoder)
        and re.search(r"(^|\.)(layers?|block|h)$", name)
    ]  # fmt: skip
    if inner := [pair for pair in lists if ".decoder." in pair[0]]:
        lists = inner  # of an encoder-decoder, the latter
    return min(lists, key=lambda pair: (pair[0].count("."), -pair[1]))[0] if lists else ""


def _kind(
    model: PreTrainedModel, inputs: dict[str, Any], given: dict[str, Any], calls: list[Call]
) -> str:
    length = inputs["input_ids"].shape[1]
    if hasattr(model.config, "canvas_length"):
        return "block diffusion"
    if "state" in inputs:
        return "action expert"
    if "decoder_input_ids" in inputs:
        return "encoder-decoder"
    if not {"pixel_values", "flattened_patches"} & inputs.keys():
        return "no image"
    across = any(call.query[2] == length != call.key.shape[2] for call in calls)
    if across or {"encoder_hidden_states", "cross_attention_states"} & given.keys():
        return "cross-attention"
    return "merged" if any(call.query[2] == length for call in calls) else "prepended"


def _streams(given: dict[str, Any], inputs: dict[str, Any]) -> tuple[str, ...]:
    length, usual = inputs["input_ids"].shape[1], ("inputs_embeds", "input_ids", "attention_mask")
    return tuple(
        f"{name} {list(value.shape)}" if torch.is_tensor(value) else name
        for name, value in given.items()
        if name not in usual
        and (length in value.shape if torch.is_tensor(value) else "deepstack" in name)
    )


def _features(
    model: PreTrainedModel, layers: str, calls: list[Call], given: dict[str, Any]
) -> tuple[str, ...]:
    """In words of the field."""
    config = model.config.get_text_config(decoder=True).to_dict()
    everything = [name for name, _ in model.named_modules()]
    parts = [name for name in everything if layers and name.startswith(layers)]
    count = len(model.get_submodule(layers)) if layers else 0
    found = _seen_in_calls(calls, layers, count, parts) | {
        "mRoPE": getattr(given.get("position_ids"), "ndim", 0) == 3,
        "DeepStack": any("deepstack" in name for name in given),
        "window over decoded tokens": "reference_sliding_attention" in _list(config, "layer_types"),
        "sparse attention (indexer)": _any(parts, "indexer"),
        "linear attention": _any(parts, "linear_attn|mamba") or "mamba_num_heads" in config,
        "convolution over tokens": _any(parts, r"conv(1d)?$"),
        "MoE": _any(parts, "experts"),
        "latent attention": bool(config.get("kv_lora_rank")),
        "QK-norm": _any(parts, r"\b(q|k|query|key|qk)_?(layer)?_?norm"),
        "logit softcap": bool(config.get("final_logit_softcapping")),
        "learned positions": _learned_positions(model, layers),
        "layers without positions": 0 in (*_list(config, "no_rope_layers"),
                                          *_list(config, "layer_rope_theta")),
        "queries scaled by position": bool(config.get("attn_temperature_tuning"))
        or "llama_4_scaling_beta" in str(config.get("rope_parameters")),
        "per-layer embeddings": _any(parts, "per_layer_|ple") or "per_layer_inputs" in given,
        "several residual streams": _any(parts, "attn_hc|hyper_connection|altup|attention_input"),
        "Q-Former": _any(everything, "qformer"),
        "Perceiver": _any(everything, "perceiver|compressor_resampler"),
        "discrete image tokens": _any(everything, "vqmodel.quantize"),
    }  # fmt: skip
    return tuple(name for name, is_so in found.items() if is_so)


def _seen_in_calls(calls: list[Call], layers: str, count: int, parts: list[str]) -> dict[str, bool]:
    dense = [call for call in calls if f"{call.module}.indexer" not in parts]
    options = {name for call in calls for name in call.options}
    attending = {call.module.removeprefix(f"{layers}.").split(".")[0] for call in calls}
    pointers = [call.key.data_ptr() for call in calls]
    return {
        f"{len(attending)} of {count} layers attend": 0 < len(attending) < count,
        "prefix attention": any("prefix" in mask_kind(call.mask) for call in calls),
        "sliding window": any("window" in mask_kind(call.mask) for call in dense),
        "value width differs": any(call.key.shape[-1] != call.value[-1] for call in calls),
        "head width differs by layer": len({call.key.shape[-1] for call in calls}) > 1,
        "attention softcap": "softcap" in options,
        "sinks": bool(options & {"s_aux", "sinks"}),
        "position bias": "position_bias" in options,
        "KV sharing": len(set(pointers)) < len(pointers),
    }


def _list(config: dict[str, Any], name: str) -> list[Any]:
    return config.get(name) or []


def _any(names: list[str], pattern: str) -> bool:
    return any(re.search(pattern, name) for name in names)


def _learned_positions(model: PreTrainedModel, layers: str) -> bool:
    above = layers.rpartition(".")[0].removesuffix(".encoder")
    return any(
        isinstance(module, nn.Embedding) and name.startswith(above) and not _ELSEWHERE.search(name)
        for name, module in model.named_modules()
        if re.search(r"position", name)
    )
