"""Heads of which a decoder loses the tokens: rows of a whole batch under each other."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LAID: Final = (Tensor.view, Tensor.reshape, torch.reshape)


class Heads(TorchFunctionMode):
    """[B, S, heads d] stays [B, S, heads, d] where [B S, heads, d] is asked for, as norms do."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in LAID and (found := _heads(args[0], args[1:])) is not None:
            return found
        return func(*args, **(kwargs or {}))


def _heads(states: Tensor, asked: tuple[Any, ...]) -> Tensor | None:
    """None: another view is asked for."""
    if states.ndim != 3 or len(asked) != 3 or asked[0] != -1:
        return None
    if asked[1] * asked[2] != states.shape[-1]:
        return None
    return states.view(*states.shape[:-1], *asked[1:])
