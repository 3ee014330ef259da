"""Which layer deviates first: the residual stream before every layer, call after call."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from vtr_export.errors import AnalysisError
from vtr_export.runtime.decoder import Decoder
from vtr_export.verify.case import Array
from vtr_export.verify.gates import Bars
from vtr_export.verify.play import Inputs, call_name, forced_passes, open_decoder, play
from vtr_export.verify.sessions import Forced, GraphError, Parts
from vtr_export.verify.taps import ShowStreams

AGREES = 1 / 30  # of what rounding may leave: nothing worth a word


def first_deviation(parts: Parts, inputs: Sequence[Inputs], bars: Bars) -> str:
    """A sentence that names the first layer whose output is not the reference's."""
    traced = [each for each in inputs if each.case.trace is not None]
    if not traced:
        return ""
    try:
        session = Forced(parts.open(parts.decoder, (*forced_passes(), ShowStreams())))
        decoder = open_decoder(parts, session)
        calls = [call for each in traced for call in _calls(session, decoder, each)]
    except (AnalysisError, GraphError) as error:
        return f"the layers could not be told apart: {error}"
    return _first_beyond(calls, bars.stream) or _largest(calls, bars.stream)


def _calls(session: Forced, decoder: Decoder, inputs: Inputs) -> list[tuple[str, list[float]]]:
    """Of each call its name, and the error before every layer and the final norm."""
    assert inputs.case.trace is not None
    play(decoder, inputs, session)
    given = [inputs.embeds[:, -1], *np.moveaxis(inputs.steps, 1, 0)]
    found = []
    for number, (first, shown, theirs) in enumerate(
        zip(given, session.shown, inputs.case.trace.streams, strict=True)
    ):
        mine = [first, *(shown[name] for name in sorted(shown, key=_number))]
        errors = [_relative(*pair) for pair in zip(mine, theirs, strict=True)]
        found.append((call_name(number, inputs.case), errors))
    return found


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])


def _first_beyond(calls: Sequence[tuple[str, list[float]]], limit: float) -> str:
    """Stream ``n`` is the input of layer ``n``: what it shows first was done by layer ``n - 1``."""
    for where, errors in calls:
        for number, error in enumerate(errors):
            if not np.isfinite(error):
                return f"{_named(number)} is the first to give infinity or NaN, in {where}"
            if error > limit:
                before = f", {errors[number - 1]:.1e} before it" if number else ""
                return (
                    f"{_named(number)} deviates first, in {where} "
                    f"(relative error {error:.1e}{before})"
                )
    return ""


def _largest(calls: Sequence[tuple[str, list[float]]], limit: float) -> str:
    """Rounding that adds up, or something behind the last layer."""
    where, errors = max(calls, key=lambda call: max(call[1]))
    worst = max(errors)
    if worst < limit * AGREES:
        return f"every layer agrees (relative error {worst:.1e}): the final norm or the head is off"
    growth = [after / max(before, 1e-7) for before, after in pairwise(errors)]
    number = 1 + int(np.argmax(growth))
    return f"{_named(number)} deviates most, in {where} (relative error {errors[number]:.1e})"


def _named(number: int) -> str:
    return f"layer {number - 1}" if number else "the embedding of the last token"


def _relative(actual: Array, expected: Array) -> float:
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    norm = np.linalg.norm(b, axis=-1)
    with np.errstate(all="ignore"):
        return float(np.max(np.linalg.norm(a - b, axis=-1) / np.maximum(norm, 1e-30)))
