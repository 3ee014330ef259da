"""Transformers' own conversions of stored tensors, run on stand-ins that hold no elements.

What transformers computes on load (parts of fused projections, experts under each other, another
order for rotary pairs) becomes views of what the shards hold, and joins of those.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from vtr_export.checkpoint import TensorRef
from vtr_export.errors import CheckpointError
from vtr_export.frontends.parts import Parts, Stored
from vtr_export.frontends.views import UnfollowedError, View

_TRIPS: Final = (ValueError, RuntimeError, LookupError, TypeError, AttributeError)  # of conversions


@dataclass(frozen=True)
class Joined:
    """Views behind each other along ``axis``; as experts if they make an axis of their own."""

    views: tuple[View, ...]
    axis: int
    shape: tuple[int, ...]
    experts: int = 0


Held: TypeAlias = View | Joined


class StandIn(Tensor):
    """In the place of a tensor; knows where the elements lie that it would hold."""

    held: Held

    @staticmethod
    def __new__(cls, held: Held) -> "StandIn":
        """Of the same shape, on no device."""
        made = torch.empty(held.shape, device="meta").as_subclass(cls)
        made.held = held
        return made

    def __init__(self, held: Held) -> None:
        self.held = held

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in STEPS:
            return STEPS[func](*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            raise UnfollowedError(f"{getattr(func, '__name__', func)} of stored tensors")
        return found


def _view(tensor: Any) -> View:
    held = tensor.held
    if not isinstance(held, View):
        raise UnfollowedError("a step behind a join")
    return held


def _sizes(shape: tuple[Any, ...]) -> tuple[int, ...]:
    (first, *_) = shape
    return tuple(shape if isinstance(first, int) else first)


def _same(tensor: Any) -> Any:
    return tensor


def _transpose(tensor: Any, dim0: int, dim1: int) -> StandIn:
    return StandIn(_view(tensor).transpose(dim0, dim1))


def _reshape(tensor: Any, *shape: Any) -> StandIn:
    return StandIn(_view(tensor).reshape(_sizes(shape)))


def _split(tensor: Any, sizes: Sequence[int], dim: int = 0) -> tuple[StandIn, ...]:
    return tuple(StandIn(part) for part in _view(tensor).split(sizes, dim))


def _chunk(tensor: Any, chunks: int, dim: int = 0) -> tuple[StandIn, ...]:
    whole = tensor.shape[dim]
    if whole % chunks:
        raise UnfollowedError(f"{whole} rows in {chunks} parts")
    return _split(tensor, [whole // chunks] * chunks, dim)


def _stack(tensors: Sequence[Any], dim: int = 0) -> StandIn:
    """Experts, of one shape each."""
    views = tuple(_view(tensor) for tensor in tensors)
    if dim or len({view.shape for view in views}) != 1:
        raise UnfollowedError("experts of unlike shape")
    return StandIn(Joined(views, 0, (len(views), *views[0].shape), len(views)))


def _cat(tensors: Sequence[Any], dim: int = 0) -> StandIn:
    """Of stacks of experts: each expert's parts under each other."""
    shapes, held = [list(tensor.shape) for tensor in tensors], [tensor.held for tensor in tensors]
    high = sum(shape.pop(dim) for shape in shapes)
    if any(shape != shapes[0] for shape in shapes):
        raise UnfollowedError("parts of unlike shape")
    whole = (*shapes[0][:dim], high, *shapes[0][dim:])
    if len(held) == 1:
        return StandIn(held[0])
    if all(isinstance(each, View) for each in held):
        return StandIn(Joined(tuple(held), dim, whole))
    if dim != 1 or not all(isinstance(each, Joined) and each.experts for each in held):
        raise UnfollowedError("a join of joins")
    rows = zip(*(each.views for each in held), strict=True)
    return StandIn(Joined(tuple(view for row in rows for view in row), 0, whole, whole[0]))


STEPS: Final[Mapping[Any, Callable[..., Any]]] = {
    Tensor.contiguous: _same,
    torch.transpose: _transpose,
    Tensor.transpose: _transpose,
    Tensor.view: _reshape,
    Tensor.reshape: _reshape,
    torch.split: _split,
    torch.chunk: _chunk,
    Tensor.chunk: _chunk,
    torch.stack: _stack,
    torch.cat: _cat,
}


def converted(
    model: PreTrainedModel, mapping: Sequence[WeightTransform], tensors: Mapping[str, TensorRef]
) -> dict[str, Stored]:
    """Parameter name → what transformers would load there, of the tensors in the shards."""
    wanted = model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {each: entry for entry in converters for each in entry.source_patterns}
    found: dict[str, Stored] = {}
    apart: dict[str, dict[str, list[TensorRef]]] = defaultdict(lambda: defaultdict(list))
    for source in sorted(tensors, key=dot_natural_key):
        args = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": wanted}
        name, pattern = rename_source_key(source, renamings, converters, **args)
        if name not in wanted:
            name, pattern = rename_source_key(source, [], [], **args)
        if name in wanted and (pattern is None or _is_either_way(of_pattern[pattern])):
            found[name] = tensors[source]
        elif name in wanted and pattern is not None:
            apart[name][pattern].append(tensors[source])
    for name, parts in apart.items():
        found = _made(model, name, of_pattern[next(iter(parts))], parts) | found
    return {name: each for name, each in found.items() if name in wanted}


def _is_either_way(converter: WeightConverter) -> bool:
    """Experts whose shape says whether they are transposed: whoever reads them asks it."""
    return all(isinstance(step, Transpose) and step.check_dims for step in converter.operations)


def _made(
    model: PreTrainedModel,
    name: str,
    converter: WeightConverter,
    parts: Mapping[str, list[TensorRef]],
) -> dict[str, Stored]:
    """What a converter makes of the tensors it collected for ``name``."""
    first = next(iter(parts.values()))[0]
    for refs in parts.values():
        _check_numbers(refs)
    own = deepcopy(converter)
    try:
        for pattern, refs in parts.items():
            own.collected_tensors[pattern] = [StandIn(View.of(ref)) for ref in refs]
        made = own.convert(name, model=model, config=model.config)
        return {each: _stored(held) for each, held in made.items()}
    except _TRIPS as error:
        raise _refusal(first, str(error)) from error


def _check_numbers(refs: Sequence[TensorRef]) -> None:
    """CheckpointError where one of several experts is missing."""
    numbers = [re.findall(r"\.(\d+)(?=\.)", ref.name)[-1:] for ref in refs]
    if len(refs) > 1 and numbers != [[str(number)] for number in range(len(refs))]:
        raise _refusal(refs[0], "some of its kind are missing")


def _stored(tensor: Any) -> Stored:
    held: Held = (tensor[0] if isinstance(tensor, list) else tensor).held
    if isinstance(held, View):
        return held.stored()
    if held.axis and not all(math.prod(view.shape) for view in held.views):
        raise UnfollowedError("an empty part")
    return Parts(tuple(view.stored() for view in held.views), held.axis, held.shape)


def _refusal(ref: TensorRef, why: str) -> CheckpointError:
    return CheckpointError(
        f"transformers computes parameters from {ref.name} on load, which an export cannot: {why}",
        where=str(ref.shard),
        hint="save the model as transformers holds it, or export another",
    )
