"""What reductions before the decoder leave of an image's tokens, from their definitions.

One image (or tile) at a time: transformers' own tower runs, what it attends to is heard at its
projections, and the projector is given the tokens that are left.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from vtr_export.reductions import Tower, VisionReduction
from vtr_export.reference.reductions import INSIDE, REDUCE
from vtr_export.reference.reductions.seen import Reduced, Seen, encoder_layers

Encode = Callable[[Mapping[str, Tensor]], Tensor]


@torch.no_grad()
def reduced_features(
    model: Any,
    given: Mapping[str, Tensor],
    reductions: Sequence[VisionReduction],
    tower: Tower,
    encode: Encode,
) -> list[Reduced]:
    """Of each image in ``given`` (``pixel_values`` [I,...]): projected features [K,D], and which.

    ``encode`` is the model's own way from an image to its projected tokens.
    """
    found = []
    for number in range(len(given["pixel_values"])):
        one = {name: values[number : number + 1] for name, values in given.items()}
        with _reducing(model, reductions, tower) as left:
            projected = encode(one)
        found.append(replace(left[0], features=projected.flatten(0, -2)))
    return found


@contextmanager
def _reducing(
    model: Any, reductions: Sequence[VisionReduction], tower: Tower
) -> Iterator[list[Reduced]]:
    """While it lasts, the projector is given what is left; the list has it afterwards."""
    left = list[Reduced]()
    projector = model.get_submodule(projector_name(model))
    with ExitStack() as stack:
        heard = stack.enter_context(_listening(model))
        notes = [
            stack.enter_context(INSIDE[each.method](each, model, tower))
            for each in reductions
            if each.method in INSIDE
        ]

        def narrow(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            left.append(_reduce(args[0][0], heard, reductions, tower, notes))
            return (left[-1].features[None].to(args[0].dtype), *args[1:])

        handle = projector.register_forward_pre_hook(narrow)
        stack.callback(handle.remove)
        yield left


def _reduce(
    features: Tensor,
    heard: Sequence["_Heard"],
    reductions: Sequence[VisionReduction],
    tower: Tower,
    notes: Sequence[Any],
) -> Reduced:
    """One reduction after the other, on the features of one image."""
    queries, keys = [each.query for each in heard], [each.key for each in heard]
    scales = [each.scale for each in heard]
    whole = Reduced(features, torch.arange(tower.grid.tokens))
    inside, last = iter(notes), None
    for number, reduction in enumerate(reductions):
        before = reductions[:number]
        seen = Seen(whole.features, queries, keys, scales, tower, before, whole.source, last)
        if reduction.method in INSIDE:
            left = next(inside)(seen)
            last = left.source
        else:
            left = REDUCE[reduction.method](reduction, seen)
        whole = _behind(whole, left)
    return whole


def _behind(before: Reduced, after: Reduced) -> Reduced:
    """``after`` says which of ``before`` it kept."""
    if after.source is None:
        return after
    at = after.source.clamp(min=0)
    source = None if before.source is None else before.source[at]
    source = source if source is None else torch.where(after.source < 0, -1, source)
    protected = after.protected
    if protected is None and before.protected is not None:
        protected = before.protected[at]
    return Reduced(after.features, source, protected)


@dataclass
class _Heard:
    """What a layer's attention compares: [H,n,d] each."""

    query: Tensor
    key: Tensor
    scale: float


@contextmanager
def _listening(model: Any) -> Iterator[list[_Heard]]:
    """Hear every attention of the vision tower, in order; filled as it runs."""
    heard = list[_Heard]()
    handles = []
    for layer in encoder_layers(model):
        attention = next(
            module for name, module in layer.named_children() if name in ("self_attn", "attention")
        )
        handles += _listen(attention, heard)
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _listen(attention: Any, heard: list[_Heard]) -> list[Any]:
    """At the projections of one attention, and at their norms where it has some."""
    parts = {}
    for part in ("q", "k"):
        norm = getattr(attention, f"{part}_norm", None)
        normed = norm is not None and not isinstance(norm, nn.Identity)
        parts[part] = norm if normed else getattr(attention, f"{part}_proj")
    queries = list[Tensor]()

    def note(_: nn.Module, __: Any, said: Tensor) -> None:
        queries.append(said)

    def pair(_: nn.Module, __: Any, said: Tensor) -> None:
        rows = [_by_head(part[0], attention.num_heads) for part in (queries.pop(), said)]
        scale = getattr(attention, "scale", None) or getattr(attention, "scaling", None)
        heard.append(_Heard(rows[0], rows[1], float(scale or rows[0].shape[-1] ** -0.5)))

    query: Any = parts["q"]
    key: Any = parts["k"]
    return [query.register_forward_hook(note), key.register_forward_hook(pair)]


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """``[n,D]`` to ``[H,n,d]``."""
    return rows.view(len(rows), heads, -1).transpose(0, 1)


def projector_name(model: Any) -> str:
    """The dotted name of what projects features to the decoder's width."""
    for name, _ in model.named_modules():
        if name.rpartition(".")[2] == "multi_modal_projector":
            return str(name)
    raise ValueError("the model has no projector")


KNOWN: Final = frozenset({*REDUCE, *INSIDE})
"""Methods that have an oracle."""
Inside = Callable[[Any, Any, Tower], AbstractContextManager[Callable[[Seen], Reduced]]]
