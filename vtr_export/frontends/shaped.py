"""Calls whose ONNX form has values without shapes, as calls whose form has them all."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Shaped(TorchFunctionMode):
    """``repeat_interleave`` by one number along one axis, and ``stack``."""

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
        if func in (torch.repeat_interleave, Tensor.repeat_interleave) and "dim" in kwargs:
            return _repeated(func, *args, **kwargs)
        return func(*args, **kwargs)


def _stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def _repeated(func: Callable[..., Any], values: Tensor, repeats: Any, *, dim: int | None) -> Any:
    if not isinstance(repeats, int) or dim is None:
        return func(values, repeats, dim=dim)
    axis = dim % values.ndim
    wide = [-1] * (values.ndim + 1)
    wide[axis + 1] = repeats
    return values.unsqueeze(axis + 1).expand(wide).flatten(axis, axis + 1)
