"""A transformers decoder's own layers, called one at a time with the rows and the past we choose.

What a layer is handed beside its rows (rotary tables, the layer's kind) is asked of the decoder's
own ``forward``; what it attends to is heard at transformers' ``AttentionInterface``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from vtr_export.errors import AnalysisError
from vtr_export.reference import layered

NAME = "vtr_reference"  # of our attention among transformers'
Mix: TypeAlias = Callable[["Attention"], Tensor]
Handed: TypeAlias = Sequence[Mapping[str, Any]] | Mapping[int, Mapping[str, Any]]
"""By layer: what it is called with beside its rows."""
APART = "moe_mm_token_type_ids"  # of a decoder's forward: who has the experts of images
BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm")  # the first there is
UNHEARD = ("s_aux", "position_bias", "cache_position_bias")  # of an attention; we know no such term


@dataclass(frozen=True)
class Attention:
    """One layer's attention before its softmax. T = past + new."""

    query: Tensor  # [B, heads, S, head_dim], rotated
    keys: Tensor  # [B, kv_heads, T, head_dim], rotated
    values: Tensor  # [B, kv_heads, T, value_dim]
    visible: Tensor  # [B, S, T] bool
    scaling: float
    softcap: float | None = None

    def for_each_head(self, states: Tensor) -> Tensor:
        """Keys or values with each kv head repeated for the query heads that share it."""
        return states.repeat_interleave(self.query.shape[1] // states.shape[1], dim=1)

    def logits(self, query: Tensor, keys: Tensor) -> Tensor:
        """Scaled, capped, not masked; for some of the rows and heads."""
        logits = query @ keys.transpose(-1, -2) * self.scaling
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


class _HeardEnoughError(Exception):
    """Leaves a call that was only asked for something on its way."""


@dataclass
class _Listening:
    visible: Tensor
    mix: Mix | None  # None: the layer is left before its softmax
    attention: Attention | None = None
    past: "_Past | None" = None


_LISTENING: ContextVar[_Listening] = ContextVar("listening")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Stands in for a layer's attention; ``[B, S, heads, value_dim]``."""
    unheard = [name for name in UNHEARD if others.get(name) is not None]
    if sliding_window is not None and sliding_window < key.shape[2]:
        unheard.append("sliding_window")
    if unheard:
        raise ValueError(f"the reference does not define attention with {unheard[0]}")
    listening = _LISTENING.get()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    attention = Attention(query, key, value, listening.visible, scaling, softcap)
    listening.attention = attention
    if listening.mix is None:
        raise _HeardEnoughError
    return listening.mix(attention), None


AttentionInterface.register(NAME, _attend)


class _Past:
    """A cache as a layer sees it: the past keys and values of one layer before the new ones."""

    is_compileable = False
    layers = ()  # what it holds of others

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        self._keys, self._values = keys, values
        self.kept: tuple[Tensor, Tensor] | None = None  # what the next call's past is

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The past and the new ones, along the tokens."""
        self.kept = key, value
        if self._keys is not None and self._values is not None:
            self.kept = torch.cat((self._keys, key), 2), torch.cat((self._values, value), 2)
        return self.kept

    def get_seq_length(self, *_: Any) -> int:
        """Length of the past."""
        return 0 if self._keys is None else self._keys.shape[2]


class _Recorder(nn.Module):
    """Stands where a layer stands, and notes what it is called with; the last one ends the call."""

    def __init__(self, layer: nn.Module, notes: list[dict[str, Any]], layers: int) -> None:
        super().__init__()
        self._held = (layer, notes, layers)  # in a tuple: the layer is not a child

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._held[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The rows as they came."""
        layer, notes, layers = self._held
        bound = signature(layer.forward).bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        for name, parameter in signature(layer.forward).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        notes.append(arguments)
        if len(notes) == layers:
            raise _HeardEnoughError
        return next(iter(bound.arguments.values()))


class Layers:
    """The layers of ``decoder`` (with ``layers``, ``norm`` and its own ``forward``)."""

    def __init__(self, decoder: nn.Module, mix: Literal["eager", "sdpa"]) -> None:
        self.decoder = cast("Any", decoder)
        self._mix: Mix = _mix if mix == "eager" else _mix_fused

    def __len__(self) -> int:
        return len(self.decoder.layers)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """While inside, the decoder's attention is ours."""
        config = self.decoder.config
        before = config._attn_implementation
        config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation = before

    def hand(
        self,
        hidden: Tensor,
        positions: Tensor,
        groups: Tensor,
        more: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Handed]:
        """What enters layer 0 for rows ``[B, S, D]``, and what each layer is handed with them.

        ``positions`` ``[B, S]``, or ``[3, B, S]`` where there are three. ``groups`` ``[B, S]``
        below 0 are of tokens that have experts of their own; ``more`` is what the decoder is given
        beside.
        """
        told = signature(self.decoder.forward).parameters.keys() & {APART}
        marks = {name: (groups < 0).long() for name in told}
        layers, notes = self.decoder.layers, list[dict[str, Any]]()
        recorders = [_Recorder(layer, notes, len(layers)) for layer in layers]
        self.decoder.layers = nn.ModuleList(recorders)
        try:
            with suppress(_HeardEnoughError):
                self.decoder(
                    inputs_embeds=hidden,
                    attention_mask=hidden.new_ones((1, 1, 1, 1), dtype=torch.bool),
                    position_ids=positions,
                    past_key_values=_Past(None, None),
                    use_cache=True,
                    **marks,
                    **{**layered.given(self.decoder, hidden), **(more or {})},
                )
        finally:
            self.decoder.layers = layers
        first = next(iter(notes[0]))
        entering = cast("Tensor", notes[0][first])
        for note in notes:
            del note[first]
        return entering, notes

    def run(
        self,
        index: int,
        hidden: Tensor,
        handed: Handed,
        past: tuple[Tensor | None, Tensor | None],
        visible: Tensor,
        change: Callable[[Tensor, Attention], Tensor] | None = None,
    ) -> tuple[Tensor, Attention, tuple[Tensor, Tensor]]:
        """Layer ``index`` on rows ``[B, S, D]``: what leaves it, its attention, and its cache.

        The cache holds keys and values, or latents that the layer makes them of. ``change`` makes
        other rows ``[B, S, D]`` of those between attention and MLP.
        """
        listening = _Listening(visible, self._mix)
        with self._changed(index, hidden, listening, change):
            left = self._call(index, hidden, handed, past, listening)
        assert listening.attention is not None, "a layer attends"
        assert listening.past is not None
        assert listening.past.kept is not None, "a layer keeps its keys"
        hidden = left[0] if isinstance(left, tuple) else left
        return hidden, listening.attention, listening.past.kept

    @contextmanager
    def _changed(
        self,
        index: int,
        entering: Tensor,
        listening: _Listening,
        change: Callable[[Tensor, Attention], Tensor] | None,
    ) -> Iterator[None]:
        """While inside, the norm before the MLP changes, in place, what it and the sum read."""
        if change is None:
            yield
            return

        def rewrite(_: nn.Module, given: tuple[Any, ...]) -> None:
            (rows,) = given
            if listening.attention is None or rows is entering:
                raise _unlike(index)
            rows.copy_(change(rows.clone(), listening.attention))

        norm = _before_mlp(self.decoder.layers[index])
        if norm is None:
            raise _unlike(index)
        handle = norm.register_forward_pre_hook(rewrite)
        try:
            yield
        finally:
            handle.remove()

    def ask(
        self,
        index: int,
        hidden: Tensor,
        handed: Handed,
        past: tuple[Tensor | None, Tensor | None],
        visible: Tensor,
    ) -> Attention:
        """What layer ``index`` would attend with on these rows; it goes no further."""
        listening = _Listening(visible, None)
        try:
            self._call(index, hidden, handed, past, listening)
        except _HeardEnoughError:
            assert listening.attention is not None, "heard"
            return listening.attention
        raise ValueError(f"layer {index} does not attend through transformers' AttentionInterface")

    def _call(
        self,
        index: int,
        hidden: Tensor,
        handed: Handed,
        past: tuple[Tensor | None, Tensor | None],
        listening: _Listening,
    ) -> Any:
        own = dict(handed[index])
        own["attention_mask"] = listening.visible[:, None]
        own["past_key_values"] = listening.past = _Past(*past)
        token = _LISTENING.set(listening)
        try:
            return self.decoder.layers[index](hidden, **own)
        finally:
            _LISTENING.reset(token)


def _before_mlp(layer: nn.Module) -> nn.Module | None:
    """The norm whose input the sum behind the MLP reads, too; None where no such is known."""
    norms = [getattr(layer, name, None) for name in BEFORE_MLP]
    if norms[0] is None and hasattr(layer, "post_feedforward_layernorm"):
        return None  # the other one stands before the sum
    return next((norm for norm in norms if norm is not None), None)


def _unlike(index: int) -> AnalysisError:
    return AnalysisError(
        f"the reference cannot change what is between attention and MLP of layer {index}",
        where="decoder",
        hint="use drop_point: between",
    )


def _mix(attention: Attention) -> Tensor:
    """Attention times V ``[B, S, heads, value_dim]``; softmax in fp32."""
    logits = attention.logits(attention.query, attention.for_each_head(attention.keys))
    logits = logits.masked_fill(~attention.visible[:, None], -torch.inf)
    probabilities = logits.softmax(-1, dtype=torch.float32).to(logits.dtype)
    sees = attention.visible[:, None].any(-1, keepdim=True)
    probabilities = probabilities.where(sees, 0)  # who sees nothing takes nothing
    mixed = probabilities @ attention.for_each_head(attention.values)
    return mixed.transpose(1, 2).contiguous()


def _mix_fused(attention: Attention) -> Tensor:
    """The same by torch's fused kernel, which never holds the probabilities."""
    if attention.softcap is not None:
        return _mix(attention)
    mixed = nn.functional.scaled_dot_product_attention(
        attention.query,
        attention.for_each_head(attention.keys),
        attention.for_each_head(attention.values),
        attn_mask=attention.visible[:, None],
        scale=attention.scaling,
    )
    return mixed.transpose(1, 2).contiguous()
