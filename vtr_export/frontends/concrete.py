"""What follows from sizes alone, worked out while a model is traced."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

CREATED: Final = (torch.arange, torch.linspace, torch.tensor, torch.as_tensor)
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
        if getattr(func, "__name__", "") == "__get__" or symbolic or not settled:
            return func(*args, **kwargs)
        if not tensors and func not in CREATED:
            return func(*args, **kwargs)
        return _ELSEWHERE.submit(func, *args, **kwargs).result()
