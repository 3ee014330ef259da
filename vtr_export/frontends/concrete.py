"""What follows from sizes alone, worked out while a model is traced."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

CREATED: Final = (torch.arange, torch.linspace, torch.tensor, torch.as_tensor)
REPEATS: Final = (torch.repeat_interleave, Tensor.repeat_interleave)
_ELSEWHERE: Final = ThreadPoolExecutor(1)  # a thread in which nothing is traced


class Concrete(TorchFunctionMode):
    """Calls on tensors that hold values (grids, counts) give values, and become constants.

    What torch.export cannot follow (``tolist``, loops over a grid) is thereby done with.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given, _ = tree_flatten((args, kwargs))
        tensors = [each for each in given if isinstance(each, Tensor)]
        settled = all(type(each) is Tensor and each.device.type == "cpu" for each in tensors)
        symbolic = any(isinstance(each, (torch.SymInt, torch.SymFloat)) for each in given)
        if func in REPEATS and not settled and isinstance(given[1], int):
            return _repeated(*args, **kwargs)
        if func is functional.conv3d and not settled and _is_patch(*args[:2]):
            return _patch_product(*args[:3])
        if func is torch.stack and not settled:
            return _stacked(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__" or symbolic or not settled:
            return func(*args, **kwargs)
        if not tensors and func not in CREATED:
            return func(*args, **kwargs)
        return _ELSEWHERE.submit(func, *args, **kwargs).result()


def _repeated(states: Tensor, repeats: int, dim: int | None = None, **_: Any) -> Tensor:
    """``repeat_interleave`` as a stack, whose axes can be told apart afterwards."""
    states, dim = (states.flatten(), 0) if dim is None else (states, dim % states.ndim)
    return _stacked([states] * repeats, dim + 1).flatten(dim, dim + 1)


def _stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """``stack`` in steps of which each has a shape."""
    return torch.cat([each.unsqueeze(dim) for each in tensors], dim)


def _is_patch(states: Tensor, weight: Tensor) -> bool:
    """Whether each input is one patch, as large as the kernel."""
    return states.shape[2:] == weight.shape[2:]


def _patch_product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[patches, C, frames, H, W] → [patches, D, 1, 1, 1]."""
    return functional.linear(states.flatten(1), weight.flatten(1), bias)[..., None, None, None]
