"""Calls whose ONNX form has values without shapes, as calls whose form has them all."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

REPEATS: Final = (torch.repeat_interleave, Tensor.repeat_interleave)


class Shaped(TorchFunctionMode):
    """``stack``, ``repeat_interleave`` by one number, sums of rows, convolutions of patches."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.stack and "out" not in kwargs:
            return _stacked(*args, **kwargs)
        if func in REPEATS and len(args) > 1 and isinstance(args[1], int):
            return _repeated(*args, **kwargs)
        if func is functional.conv3d and _is_patch(*args[:2]):
            return _patch_product(*args[:3])
        if func is functional.embedding_bag and _is_weighted(args, kwargs):
            return (args[1][args[0]] * kwargs["per_sample_weights"][..., None]).sum(1)
        return func(*args, **kwargs)


def _is_weighted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether equally many rows of a table, each with its weight, are summed."""
    others = {kwargs.get(name) for name in ("offsets", "max_norm", "padding_idx")}
    is_sum = kwargs.get("mode") == "sum" and kwargs.get("per_sample_weights") is not None
    return len(args) == 2 and args[0].ndim == 2 and is_sum and others == {None}


def _stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def _repeated(values: Tensor, repeats: int, dim: int | None = None, **_: Any) -> Tensor:
    values, axis = (values.flatten(), 0) if dim is None else (values, dim % values.ndim)
    wide = [-1] * (values.ndim + 1)
    wide[axis + 1] = repeats
    return values.unsqueeze(axis + 1).expand(wide).flatten(axis, axis + 1)


def _is_patch(states: Tensor, weight: Tensor) -> bool:
    """Whether each input is one patch, as large as the kernel."""
    return states.shape[2:] == weight.shape[2:]


def _patch_product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[patches, C, frames, H, W] → [patches, D, 1, 1, 1]."""
    return functional.linear(states.flatten(1), weight.flatten(1), bias)[..., None, None, None]
