"""What a schedule keeps from layer to layer, as far as that can be said without a model."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from vtr_export.errors import InputError
from vtr_export.schedule import Keep, Model, Schedule
from vtr_export.schedule_document import keep_values

Amount = int | Fraction  # tokens of an image, or the share of them where their number is not known


@dataclass(frozen=True)
class Shape:
    """What a schedule must know of a model, given by hand."""

    layers: int
    tokens_per_image: int | None
    mrope: bool = False


@dataclass(frozen=True)
class Steps:
    """``cuts`` are (before_layer, amount), ascending; before the first everything is there.

    ``layers`` and ``tokens`` (of an image) are None where nothing says them.
    """

    cuts: tuple[tuple[int, Amount], ...]
    layers: int | None
    tokens: int | None

    @property
    def whole(self) -> Amount:
        """Everything."""
        return Fraction(1) if self.tokens is None else self.tokens

    def share(self, amount: Amount) -> Fraction | None:
        """``amount`` as a part of everything; None for tokens of an unknown number."""
        if isinstance(amount, Fraction):
            return amount
        return None if self.tokens is None else Fraction(amount, self.tokens)

    def runs(self) -> Iterator[tuple[int, Amount]]:
        """(first layer, amount) wherever the amount changes, from layer 0 on."""
        before: Amount | None = None
        for layer, amount in sorted(({0: self.whole} | dict(self.cuts)).items()):
            if amount != before:
                yield layer, amount
            before = amount

    def at(self, layer: int) -> Amount:
        """What enters ``layer``."""
        return next((amount for first, amount in reversed(self.cuts) if first <= layer), self.whole)

    def per_layer(self) -> tuple[Amount, ...] | None:
        """What enters each layer; None where their number is not known."""
        return None if self.layers is None else tuple(map(self.at, range(self.layers)))

    def mean_share(self) -> Fraction | None:
        """Mean over the layers; None where it is not known."""
        amounts = self.per_layer()
        shares = [self.share(amount) for amount in amounts or ()]
        known = [share for share in shares if share is not None]
        return sum(known, Fraction()) / len(known) if shares and known == shares else None


def steps_of(
    schedule: Schedule,
    model: Model | None = None,
    *,
    layers: int | None = None,
    tokens: int | None = None,
) -> Steps:
    """Read a schedule with what is known: a model, or its layers and an image's tokens.

    A list of keeps says how many layers there are, and with ``from: previous``, where nothing can
    be dropped before layer 0, how many tokens. What is known is checked: ScheduleError.
    """
    if model is not None:
        layers = _same("layers", layers, model.layers)
        tokens = _same("tokens", tokens, model.tokens_per_image)
    keep = schedule.prefill.keep
    if keep:
        layers = len(keep) if layers is None else layers
        first = keep[0]
        if tokens is None and isinstance(first, int) and schedule.prefill.score.source != "next":
            tokens = first
    if layers is not None and (model is not None or tokens is not None):
        schedule.resolve(model or Shape(layers, tokens))
    rounding = schedule.prefill.rounding
    amounts = [
        _amount(Keep(value.numerator, value.denominator, rounding), value, tokens)
        for _, value in keep_values(schedule.prefill)
    ]
    if keep is None:
        firsts = [stage.before_layer for stage in schedule.prefill.stages or ()]
        return Steps(tuple(zip(firsts, amounts, strict=True)), layers, tokens)
    whole = Fraction(1) if tokens is None else tokens
    before = [whole, *amounts]
    cuts = [(i, amount) for i, amount in enumerate(amounts) if amount != before[i]]
    return Steps(tuple(cuts), layers, tokens)


def _amount(keep: Keep, value: Amount, tokens: int | None) -> Amount:
    return value if isinstance(value, int) or tokens is None else keep.of(tokens)


def _same(name: str, given: int | None, known: int | None) -> int | None:
    """What the model says, or else what was given."""
    if None not in (given, known) and given != known:
        raise InputError(
            f"{given} {name}, but the model has {known}",
            where=f"--{name}",
            hint=f"leave --{name} out: the model says it",
        )
    return given if known is None else known
