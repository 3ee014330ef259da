"""Latent attention whose cache holds keys and values, not the latents they are made of.

Of latents each call would make keys and values of all tokens anew; as they are, each is made once,
and a score finds past keys before new ones.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vtr_export.errors import CheckpointError


def expand_early(model: Any) -> None:
    """Have every latent attention in ``model`` hand its cache keys and values.

    CheckpointError for one that makes them in a way of its own.
    """
    for module in model.modules():
        if not hasattr(module, "kv_lora_rank"):
            continue
        if not hasattr(module, "expand_kv"):
            raise CheckpointError(
                f"{type(module).__name__} makes keys and values of latents in a way of its own",
                hint="this architecture cannot be exported; report it with its config.json",
            )
        vars(module)["forward"] = partial(_attend, module, module.forward)


def _attend(attention: Any, forward: Any, *args: Any, past_key_values: Any, **kwargs: Any) -> Any:
    """Transformers' own forward keeps no latents where it is given no cache."""

    def expanded(latents: Tensor, rotated: Tensor) -> Any:
        made = _expanded(attention, latents, rotated)
        return past_key_values.update(*made, attention.layer_idx)

    vars(attention)["expand_kv"] = expanded
    with _OneHead():
        return forward(*args, past_key_values=None, **kwargs)


class _OneHead(TorchFunctionMode):
    """Rows [B, S, D] viewed as [B, 1, S, D] get an axis, and keep the one they are counted on."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.view and len(args) == 5 and args[0].ndim == 3 and args[2] == 1:
            return args[0].unsqueeze(1)
        return func(*args, **(kwargs or {}))


def _expanded(attention: Any, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1, S, rank] and [B, 1, S, rope] → keys and values [B, heads, S, width]."""
    widths = [attention.qk_nope_head_dim, attention.v_head_dim]
    both = attention.kv_b_proj(latents[:, 0]).unflatten(-1, (attention.num_heads, sum(widths)))
    plain, values = both.transpose(1, 2).split(widths, dim=-1)
    return torch.cat((plain, rotated.expand(-1, plain.shape[1], -1, -1)), dim=-1), values
