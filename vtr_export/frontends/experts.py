"""A mixture of experts that can be traced for any number of tokens: every token through them all.

Experts that were not chosen for a token count nothing. What this costs is said by the facts, whose
``intermediate`` is that of all experts. A block's own code lays all rows of a batch under each
other; while it is traced they stay where they are, so that the axis of tokens is not lost.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vtr_export.frontends.parts import Stored

WEIGHTS: Final = ("gate_up_proj", "up_proj", "down_proj")
LAID: Final = (Tensor.view, Tensor.reshape, torch.reshape)
LAST: Final = (Tensor.softmax, torch.softmax, functional.softmax)
Block: TypeAlias = Callable[..., Any]


def open_experts(model: Any, tensors: Mapping[str, Stored], mode: FakeTensorMode) -> None:
    """Have every mixture of experts in ``model`` take all its rows as they lie.

    ``tensors`` are the checkpoint's, by name: experts are read as they are stored.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    found = {name: m for name, m in modules.items() if hasattr(m, "_apply_gate")}
    for name, experts in found.items():
        with mode:
            _take_as_stored(experts, name, tensors)
        vars(experts)["forward"] = partial(dense, experts)
        block = modules[name.rpartition(".")[0]]
        vars(block)["forward"] = partial(_within, block.forward)
    for block in modules.values():
        if (own := BLOCKS.get(type(block).__name__)) is not None:
            vars(block)["forward"] = partial(own, block)


def _take_as_stored(experts: Any, name: str, tensors: Mapping[str, Stored]) -> None:
    """Weights of the checkpoint's shape, and whether that is the other way round."""
    for part in WEIGHTS:
        weight = getattr(experts, part, None)
        if weight is None:
            continue
        shape, own = tuple(tensors[f"{name}.{part}"].shape), tuple(weight.shape)
        turned = shape == (own[0], own[2], own[1]) != own
        if turned:
            stored = nn.Parameter(torch.empty(shape, dtype=weight.dtype), requires_grad=False)
            experts.register_parameter(part, stored)
        setattr(experts, f"is_{part}_turned", turned != getattr(experts, "is_transposed", False))


def dense(self: Any, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """[B, S, D], and of the k best [B, S, k] their numbers and shares → [B, S, D]."""
    is_gated = hasattr(self, "gate_up_proj")
    first = _linear(self, hidden[:, None], "gate_up_proj" if is_gated else "up_proj")
    inner = self._apply_gate(first) if is_gated else self.act_fn(first)
    each = _linear(self, inner, "down_proj")
    each = self.post_expert_norm(each) if getattr(self, "has_post_expert_norm", False) else each
    spread = _spread(chosen, shares.to(hidden.dtype), each.shape[1])
    mixed: Tensor = (each * _by_expert(spread)).sum(1)
    return mixed


def _linear(experts: Any, states: Tensor, name: str) -> Tensor:
    """[B, 1 or experts, S, in] → [B, experts, S, out]."""
    weight = getattr(experts, name)
    is_turned = getattr(experts, f"is_{name}_turned")
    found: Tensor = states @ (weight if is_turned else weight.transpose(1, 2))
    bias = getattr(experts, f"{name}_bias", None)
    return found if bias is None else found + bias[:, None]


def _spread(index: Tensor, values: Tensor, size: int) -> Tensor:
    """[..., k] at ``index`` of [..., size]; zero elsewhere."""
    is_there = index[..., None] == torch.arange(size)
    return torch.where(is_there, values[..., None], 0.0).sum(-2)


def _by_expert(spread: Tensor) -> Tensor:
    """[B, S, experts] → [B, experts, S, 1]."""
    return spread.transpose(1, 2)[..., None]


def _llama4(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Shares weigh what goes into an expert, not what comes out."""
    logits = functional.linear(hidden, block.router.weight)
    best, chosen = logits.topk(block.top_k, dim=-1)
    shares = _spread(chosen, best.float().sigmoid().to(hidden.dtype), block.num_experts)
    experts = block.experts
    gate, up = (hidden[:, None] * _by_expert(shares) @ experts.gate_up_proj).chunk(2, dim=-1)
    each = (up * experts.act_fn(gate)) @ experts.down_proj
    return block.shared_expert(hidden) + each.sum(1), logits


def _ernie4_5_vl(block: Any, hidden: Tensor, is_image: Tensor) -> tuple[Tensor, None]:
    """Tokens of text and of images [B, S] have experts of their own."""
    text, image = (_mixed(part, hidden) for part in (block.text_moe, block.vision_moe))
    mixed = torch.where(is_image[..., None], image, text)
    return mixed if block.shared_experts is None else mixed + block.shared_experts(hidden), None


def _mixed(block: Any, hidden: Tensor) -> Tensor:
    with Unflattened():
        _, shares, chosen = block.gate(hidden)
    found: Tensor = block.experts(hidden, chosen, shares)
    return found


BLOCKS: Final[Mapping[str, Block]] = {
    "Llama4TextMoe": _llama4,
    "Ernie4_5_VLMoeMoeBlock": _ernie4_5_vl,
}


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
        if func in LAST and _is_last(args, kwargs):
            return torch.softmax(args[0], dim=-1, dtype=kwargs.get("dtype"))
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
