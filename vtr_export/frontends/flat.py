"""Decoder layers that lay a batch's rows under each other: traced with rows where they are.

Behind a view of [B * S, D] no axis of tokens could be told.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from torch import Tensor
from torch.overrides import TorchFunctionMode

LAYERS: Final = ("OPTDecoderLayer",)  # around the MLP


def keep_rows(model: Any) -> None:
    """Each such layer's own ``forward``, on rows [B, S, D] throughout."""
    for module in model.modules():
        if type(module).__name__ in LAYERS:
            vars(module)["forward"] = partial(_kept, module.forward)


class _Rows(TorchFunctionMode):
    """``reshape(-1, D)`` of rows [B, S, D] leaves them so."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        is_flat = func is Tensor.reshape and len(args) == 3 and args[1] == -1
        if is_flat and args[0].ndim == 3 and args[2] == args[0].shape[-1]:
            return args[0]
        return func(*args, **(kwargs or {}))


def _kept(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Rows():
        return forward(*args, **kwargs)
