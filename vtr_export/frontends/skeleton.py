"""A checkpoint's model without its weights: fake parameters, real buffers, renamed tensors."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module, Parameter
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from vtr_export.checkpoint import CONFIG, Checkpoint, TensorRef
from vtr_export.errors import CheckpointError
from vtr_export.frontends.parts import Parts, Stored

MERGED: Final = [(MergeModulelist, 0)]  # experts, one by one
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors spells them
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_REFUSALS = (  # what transformers' own code was seen to trip over; it has no common error
    StrictDataclassError,  # a value of another type than its field's
    ValueError,  # a model_type it does not know
    LookupError,  # an activation or rope type it does not know; an empty list of dtypes
    TypeError,  # a rotary base that is no number
    AttributeError,  # a dtype that torch has not
)


class _EmptyOnMeta(TorchFunctionMode):
    """Uninitialised and random tensors (parameters) take no memory; computed ones (buffers) do."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        placed = {"device": "meta"} if func in (torch.empty, torch.rand, torch.randn) else {}
        return func(*args, **((kwargs or {}) | placed))


def build_skeleton(
    config: PretrainedConfig, dtype: torch.dtype, mode: FakeTensorMode
) -> PreTrainedModel:
    """The model of ``config`` with parameters that have a shape and no data, and real buffers."""
    config._attn_implementation = "vtr"
    _spare_sams(config)
    _settle(config.get_text_config())
    try:
        with _EmptyOnMeta():
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    except _REFUSALS as error:
        raise _refusal("build a model of", error, config.name_or_path) from error
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise CheckpointError(
                f"the buffer {name!r} of this architecture is not computed when it is built",
                hint="report the architecture; its checkpoint cannot be exported yet",
            )
    model = model.eval()
    for module in model.modules():
        _fake_parameters(module, mode)
    return model


def _spare_sams(config: PretrainedConfig) -> None:
    """SAM's towers look an attention up among their own, which ours is not."""
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            if part.model_type.endswith(("sam_vision_model", "sam_vision")):
                part._attn_implementation = "eager"
            _spare_sams(part)


def _settle(config: PretrainedConfig) -> None:
    """Within the context, which no run leaves, dynamic NTK scaling changes nothing."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") == "dynamic":
        config.rope_parameters = {**rope, "rope_type": "default"}


def _fake_parameters(module: Module, mode: FakeTensorMode) -> None:
    with mode:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = Parameter(fake, requires_grad=False)


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """Transformers' own reading of ``config.json``; runs no code of the checkpoint."""
    try:
        if checkpoint.files:
            return AutoConfig.for_model(**checkpoint.config)
        return AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    except _REFUSALS as error:
        raise _refusal("read", error, checkpoint.folder) from error


def _refusal(what: str, error: Exception, folder: str | Path) -> CheckpointError:
    """Transformers' complaint about a configuration, whatever it raised."""
    return CheckpointError(
        f"transformers cannot {what} this configuration: {type(error).__name__}: {error}",
        where=str(Path(folder) / CONFIG),
        hint="check it against a fresh download of the model",
    )


def name_tensors(model: PreTrainedModel, checkpoint: Checkpoint) -> Mapping[str, Stored]:
    """Parameter name → checkpoint tensor, renamed as transformers renames hub names on load."""
    wanted = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    turned = {  # stored the other way round, and read as stored
        pattern
        for entry in converters
        if all(isinstance(step, Transpose) for step in entry.operations)
        for pattern in entry.source_patterns
    }
    found: dict[str, Stored] = {}
    apart: dict[str, dict[tuple[int, int], TensorRef]] = defaultdict(dict)
    for source, ref in checkpoint.tensors.items():
        args = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": wanted}
        name, pattern = rename_source_key(source, renamings, converters, **args)
        if name not in wanted:
            name, pattern = rename_source_key(source, [], [], **args)
        if name in wanted and (pattern is None or pattern in turned):
            found[name] = ref
        elif name in wanted:
            cut = _split(ref, _chunks(name, pattern, converters))
            found |= cut
            if not cut:
                apart[name][_place(source, pattern, converters)] = ref
    found |= {name: _joined(parts) for name, parts in apart.items() if name not in found}
    _tie(model, wanted, found)
    _check(model, checkpoint, found)
    return found


def _chunks(
    name: str, pattern: str | None, converters: Sequence[WeightConverter]
) -> tuple[str, ...]:
    """The parameters that one tensor is cut into, along its first axis; none: it is not."""
    for entry in converters:
        steps = [(type(step), getattr(step, "dim", None)) for step in entry.operations]
        if pattern in entry.source_patterns and steps == [(Chunk, 0)]:
            first, *_ = entry.target_patterns
            return tuple(name.replace(first, each) for each in entry.target_patterns)
    return ()


def _split(ref: TensorRef, names: Sequence[str]) -> dict[str, TensorRef]:
    """Equal parts of a tensor along its first axis, by name; none where it has no such parts."""
    count = len(names)
    if not count or ref.blocks != 1 or ref.shape[0] % count:
        return {}
    size, shape = ref.size_bytes // count, (ref.shape[0] // count, *ref.shape[1:])
    return {
        name: replace(ref, shape=shape, size_bytes=size, offset=ref.offset + number * size)
        for number, name in enumerate(names)
    }


def _joined(parts: Mapping[tuple[int, int], TensorRef]) -> Parts:
    """One parameter of (expert, part) → tensor; CheckpointError where that is not all of it."""
    whole = Parts.of(parts) if all(expert >= 0 for expert, _ in parts) else None
    if whole is None:
        raise _apart(next(iter(parts.values())))
    return whole


def _place(
    source: str, pattern: str | None, converters: Sequence[WeightConverter]
) -> tuple[int, int]:
    """Number of the expert and of the part of it that ``source`` is; -1: put together otherwise."""
    for entry in converters:
        if pattern in entry.source_patterns and len(entry.target_patterns) == 1:
            steps = [(type(step), getattr(step, "dim", None)) for step in entry.operations]
            number = re.search(r"experts\.(\d+)\.", source)
            if steps == [(Concatenate, 1)]:
                return 0, entry.source_patterns.index(pattern)
            if steps in (MERGED, [*MERGED, (Concatenate, 1)]) and number is not None:
                return int(number[1]), entry.source_patterns.index(pattern)
    return -1, 0


def _apart(ref: TensorRef) -> CheckpointError:
    return CheckpointError(
        f"transformers computes parameters from {ref.name} on load, which an export cannot",
        where=str(ref.shard),
        hint="save the model as transformers holds it, or export another",
    )


def _tie(model: PreTrainedModel, wanted: Mapping[str, object], found: dict[str, Stored]) -> None:
    """Give tied parameters the one tensor that the checkpoint holds for them."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False) and not getattr(
        model.config, "tie_word_embeddings", False
    ):
        return
    for target, source in (model._tied_weights_keys or {}).items():
        for one, other in ((target, source), (source, target)):
            if one in wanted and one not in found and other in found:
                found[one] = found[other]


def _check(model: PreTrainedModel, checkpoint: Checkpoint, found: Mapping[str, Stored]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = sorted(name for name in parameters if name not in found)
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the model's parameters are in no shard, the first: {missing[0]}",
            where=str(checkpoint.folder),
            hint="download the missing shards again, or check `architectures` in config.json",
        )
    for name, ref in found.items():
        if name in parameters and ref.dtype not in FLOATS:
            raise CheckpointError(
                f"{ref.name} is stored as {ref.dtype}: the checkpoint is quantised",
                where=str(ref.shard),
                hint="start from a float16, bfloat16 or float32 checkpoint",
            )


def check_shapes(model: PreTrainedModel, tensors: Mapping[str, Stored]) -> None:
    """CheckpointError where a parameter's tensor has another shape."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        ref = tensors[name]
        if tuple(parameter.shape) != tuple(ref.shape):
            raise CheckpointError(
                f"{ref.name} has shape {list(ref.shape)}, "
                f"but config.json asks for {list(parameter.shape)}",
                where=str(ref.shard),
                hint="config.json and the weights belong to different models",
            )
