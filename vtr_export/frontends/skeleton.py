"""A checkpoint's model without its weights: fake parameters, real buffers, renamed tensors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module, Parameter
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from vtr_export import models
from vtr_export.checkpoint import CONFIG, Checkpoint
from vtr_export.errors import CheckpointError
from vtr_export.frontends.conversions import converted
from vtr_export.frontends.parts import Stored
from vtr_export.frontends.remote import model_name
from vtr_export.inner_decoder import point_at_layers

HOLDERS = ("ShieldGemma2ForImageClassification",)  # whose `model` is the one that is exported
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
    config: PretrainedConfig, dtype: torch.dtype, mode: FakeTensorMode, *, trusted: bool = False
) -> PreTrainedModel:
    """The model of ``config`` with parameters that have a shape and no data, and real buffers.

    ``trusted``: by the checkpoint's own code, where ``config`` names it.
    """
    models.register()
    config._attn_implementation = "vtr"
    _spare_sams(config)
    _settle(config.get_text_config())
    try:
        with _EmptyOnMeta():
            model: PreTrainedModel = _auto_class(config, trusted).from_config(
                config, dtype=dtype, trust_remote_code=trusted
            )
    except _REFUSALS as error:
        raise _refusal("build a model of", error, config.name_or_path) from error
    for module in model.modules():
        _fill_buffers(module)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise CheckpointError(
                f"the buffer {name!r} of this architecture is not computed when it is built",
                hint="report the architecture; its checkpoint cannot be exported yet",
            )
    point_at_layers(model)
    model = model.eval()
    for module in model.modules():
        _fake_parameters(module, mode)
        _spare_temperature(module)
    return model


def _auto_class(config: PretrainedConfig, trusted: bool) -> Any:
    if not trusted:
        return AutoModelForImageTextToText
    return getattr(transformers, model_name(config.auto_map, config.name_or_path))


def _spare_sams(config: PretrainedConfig) -> None:
    """SAM's towers look an attention up among their own, which ours is not."""
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            if part.model_type.endswith(("sam_vision_model", "sam_vision")):
                part._attn_implementation = "eager"
            _spare_sams(part)


def _settle(config: PretrainedConfig) -> None:
    """Within the context, which no run leaves, dynamic NTK scaling changes nothing."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic" and not rope.get("alpha"):  # a constant scaling
        config.rope_parameters = {**rope, "rope_type": "default"}


def _spare_temperature(module: Module) -> None:
    """Within the context, queries are not scaled by how far they stand."""
    if getattr(module, "attn_temperature_tuning", False):
        vars(module)["attn_temperature_tuning"] = False


def _fill_buffers(module: Module) -> None:
    """Of timm's modules, which compute them in a call of its own, into memory that they have."""
    compute = getattr(module, "init_non_persistent_buffers", None)
    empty = {n: each for n, each in module.named_buffers(recurse=False) if each.is_meta}
    if compute is not None and empty:
        for name, buffer in empty.items():
            module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
        compute()


def _fake_parameters(module: Module, mode: FakeTensorMode) -> None:
    with mode:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = Parameter(fake, requires_grad=False)


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """Transformers' own reading of ``config.json``; runs no code of it that was not run before."""
    trusted = bool(checkpoint.code)
    models.register()
    try:
        if checkpoint.files and not trusted:
            return AutoConfig.for_model(**checkpoint.config)
        return AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=trusted
        )
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
    outer = _holder(model, checkpoint)
    found = converted(outer, get_model_conversion_mapping(outer), checkpoint.tensors)
    if outer is not model:
        found = {name.removeprefix("model."): each for name, each in found.items()}
    _tie(model, model.state_dict(), found)
    _check(model, checkpoint, found)
    return found


def _holder(model: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel:
    """The model that was saved: ours, or one that holds it."""
    name = (checkpoint.config.get("architectures") or [""])[0]
    if name not in HOLDERS:
        return model
    with torch.device("meta"):
        outer: PreTrainedModel = getattr(transformers, name)(model.config)
    return outer


def _tie(model: PreTrainedModel, wanted: Mapping[str, object], found: dict[str, Stored]) -> None:
    """Give tied parameters the one tensor that the checkpoint holds for them."""
    config, tied = model.config, dict(model.all_tied_weights_keys)  # of the parts inside it, too
    if any(getattr(c, "tie_word_embeddings", False) for c in (config, config.get_text_config())):
        tied |= model._tied_weights_keys or {}
    for target, source in tied.items():
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
