"""Are a model's layers all alike? Then three of them are traced, and the rest stamped."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.nn import Module, ModuleList
from transformers import PreTrainedModel

from vtr_export.frontends.layered import beside
from vtr_export.passes.stamp_layers import TRACED

OWN = {"layer_idx", "layer_index", "idx"}  # a layer's number is no difference


@dataclass(frozen=True)
class Stack:
    """A list of ``layers`` layers at the dotted ``name`` of a model."""

    name: str
    layers: int
    is_truncated: bool


@dataclass(frozen=True)
class Stacks:
    """The two stacks of a vision-language model."""

    vision: Stack
    text: Stack


@contextmanager
def truncated(model: PreTrainedModel, *, vision: bool = True) -> Iterator[Stacks]:
    """Leave three layers of each uniform stack in ``model``, for as long as it is traced.

    A vision tower also keeps those layers behind the selected one, which nobody uses; without
    ``vision`` it keeps all.
    """
    config, unused = model.config, 0
    selected = getattr(config, "vision_feature_layer", None)
    vision_name = _name(model, "vision_tower")
    modules = model.named_modules()
    text_name = next((f"{n}.layers" for n, m in modules if m is model.get_decoder()), "")
    if isinstance(selected, int) and vision_name:
        depth = len(_layers(model, vision_name))
        config.vision_feature_layer = selected if selected < 0 else selected - depth - 1
        unused = -1 - config.vision_feature_layer
    unused = unused if vision else 0
    seen = _stack(model, vision_name, unused, may=vision and isinstance(selected, int))
    text = _stack(model, text_name, 0, may=not beside(model))
    originals = {stack.name: _layers(model, stack.name) for stack in (seen, text)}
    for stack, extra in ((seen, unused), (text, 0)):
        if stack.is_truncated:
            _replace(model, stack.name, originals[stack.name][: TRACED + extra])
    try:
        yield Stacks(seen, text)
    finally:
        config.vision_feature_layer = selected
        for name, layers in originals.items():
            _replace(model, name, layers)


def _name(model: PreTrainedModel, part: str) -> str:
    """The dotted name of the list of layers inside ``part``, or an empty one."""
    for name, module in model.named_modules():
        steps = name.split(".")
        if isinstance(module, ModuleList) and part in steps and steps[-1] in ("layers", "layer"):
            return str(name)
    return ""


def _layers(model: PreTrainedModel, name: str) -> ModuleList:
    layers = model.get_submodule(name) if name else ModuleList()
    assert isinstance(layers, ModuleList)
    return layers


def _replace(model: PreTrainedModel, name: str, layers: ModuleList) -> None:
    if name:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layers)


def _stack(model: PreTrainedModel, name: str, unused: int, *, may: bool = True) -> Stack:
    """``may``: whether it is known which layers are used, and none has embeddings of its own."""
    layers = list(_layers(model, name))
    used = len(layers) - unused
    return Stack(name, used, may and used > TRACED and is_uniform(layers))


def is_uniform(layers: list[Module]) -> bool:
    """True if all layers have the same classes, settings, and shapes of parameters and buffers."""
    first = _fingerprint(layers[0])
    return all(_fingerprint(layer) == first for layer in layers[1:])


def _fingerprint(layer: Module) -> list[tuple[object, ...]]:
    return [
        (
            name,
            type(module),
            sorted((k, v) for k, v in vars(module).items() if _is_setting(k, v)),
            [(k, v.shape) for k, v in module.named_parameters(recurse=False)],
            [(k, v.shape) for k, v in module.named_buffers(recurse=False)],
        )
        for name, module in layer.named_modules()
    ]


def _is_setting(name: str, value: object) -> bool:
    return name not in OWN and isinstance(value, (bool, int, float, str))
