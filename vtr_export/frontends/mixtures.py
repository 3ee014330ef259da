"""Any mixture of experts through transformers' own blocks, traced for any number of tokens.

Every token goes through all experts, and those that were not chosen count nothing. A block's own
code lays all rows of a batch under each other; while it is traced they stay where they are, so
that the axis of tokens is not lost.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME: Final = "vtr"
LAID: Final = (Tensor.view, Tensor.reshape, torch.reshape)


def dense(self: Any, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """[B, S, D], and of the k best [B, S, k] their numbers and shares → [B, S, D]."""
    first = _linear(self, hidden[:, None], "gate_up_proj" if self.has_gate else "up_proj")
    inner = self._apply_gate(first) if self.has_gate else self.act_fn(first)
    each = _linear(self, inner, "down_proj")
    each = self.post_expert_norm(each) if self.has_post_expert_norm else each
    spread = _spread(chosen, shares.to(hidden.dtype), each.shape[1])
    mixed: Tensor = (each * spread.transpose(1, 2)[..., None]).sum(1)
    return mixed


def _linear(experts: Any, states: Tensor, name: str) -> Tensor:
    """[B, 1 or experts, S, in] → [B, experts, S, out]."""
    weight = getattr(experts, name)
    found: Tensor = states @ (weight if experts.is_transposed else weight.transpose(1, 2))
    return found + getattr(experts, f"{name}_bias")[:, None] if experts.has_bias else found


def _spread(index: Tensor, values: Tensor, size: int) -> Tensor:
    """[..., k] at ``index`` of [..., size]; zero elsewhere."""
    found: Tensor = torch.where(index[..., None] == torch.arange(size), values[..., None], 0.0).sum(
        -2
    )
    return found


ALL_EXPERTS_FUNCTIONS.register(NAME, dense)


class Unflattened(TorchFunctionMode):
    """Rows [B, S, D] stay so where a block asks for [B * S, D]; its first axis is then two."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in LAID and (found := _laid(args[0], _sizes(args))) is not None:
            return found
        if func is Tensor.expand and args[0].ndim == len(_sizes(args)) + 1:
            return args[0].expand(-1, *_sizes(args))
        if func in (Tensor.gather, torch.gather) and _is_last(args, kwargs):
            values, index = args[0], kwargs.get("index", args[-1])
            is_there = index[..., None] == torch.arange(values.shape[-1])
            return torch.where(is_there, values[..., None, :], 0.0).sum(-1)
        if func is Tensor.scatter_ and _is_last(args, kwargs):
            values, _, index, new = args
            is_there = (index[..., None] == torch.arange(values.shape[-1])).to(values.dtype)
            return values.copy_(is_there.sum(-2) * new)  # a mask, of zeros until now
        return func(*args, **kwargs)


def _sizes(args: tuple[Any, ...]) -> tuple[Any, ...]:
    given = args[1:]
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


def _is_last(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Of rows that lie flat, axis 1 is the last."""
    axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return bool(args[0].ndim == 3 and axis in (1, -1))


def _laid(states: Tensor, sizes: tuple[Any, ...]) -> Tensor | None:
    """What a block gets instead of a view of rows under each other; None: what it asked for."""
    if states.ndim == 3 and len(sizes) == 2 and sizes[1] == states.shape[-1]:
        return states
    if states.ndim == 3 and len(sizes) == 3 and sizes[0] == -1:
        return states.view(*states.shape[:-1], *sizes[1:])
    flat: Tensor | None = None
    if states.ndim == 4 and len(sizes) == 2 and sizes[0] == -1:
        flat = states.flatten(-2)
    return flat


def _within(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with Unflattened():
        return forward(*args, **kwargs)


def lay_open(model: Any) -> None:
    """Have every mixture of experts in ``model`` take all its rows as they lie."""
    mixtures = [m for m in model.modules() if hasattr(getattr(m, "experts", None), "_apply_gate")]
    if mixtures:
        model.set_experts_implementation(NAME)
    for block in mixtures:
        vars(block)["forward"] = partial(_within, block.forward)
