"""VTW's rule: withdraw all vision tokens from the first layer on where that no longer shows."""

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Final, Protocol

from vtr_export.errors import InputError
from vtr_export.search.candidate import Candidate, Space

FIRST_LAYER: Final = 5


class Measured(Protocol):
    """Of a measurement, what matters here."""

    @property
    def kl(self) -> float | None:
        """Mean KL(unpruned ‖ candidate) in nats."""
        ...


def choose_k(
    measure: Callable[[list[Candidate]], Sequence[Measured]],
    space: Space,
    eta: float,
    first_layer: int = FIRST_LAYER,
) -> int | None:
    """The first layer from ``first_layer`` on whose withdrawal has a mean KL of at most ``eta``.

    None where even the last layer needs to see the image. Layers are measured one by one, the
    shallow first. Published for ``eta``: 0.003 (LLaVA-1.5-7B), 0.0005 (13B), 0.0001 (LLaVA-1.6-7B),
    of KL(full ‖ withdrawn) of the last prompt token's logits, mean of 20 questions.
    :meth:`vtr_export.search.runner.Runner.measure` takes the mean over all tokens of the unpruned
    answer, which is the same for answers of one token and another scale for longer ones.
    InputError for an ``eta`` or a layer that cannot be.
    """
    check_rule(space, eta, first_layer)
    for layer in range(first_layer, space.layers):
        [measured] = measure([space.step(layer, 0, space.scores[0])])
        if measured.kl is not None and measured.kl <= eta:
            return layer
    return None


def check_rule(space: Space, eta: float, first_layer: int) -> None:
    """InputError for an ``eta`` or a layer that cannot be."""
    if not isfinite(eta) or eta < 0:
        raise InputError(f"eta is {eta}", hint="a small KL in nats, 0.003")
    if not 1 <= first_layer < space.layers:
        raise InputError(
            f"first layer {first_layer} of {space.layers}",
            hint=f"1 to {space.layers - 1}: nothing is withdrawn before layer 0",
        )
