"""The vision part of a schedule, fitted to a model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from vtr_export.errors import ScheduleError
from vtr_export.families.facts import ModelFacts
from vtr_export.families.reducible import FAMILIES, tower_of
from vtr_export.reductions import Tower, VisionReduction
from vtr_export.resolved import Resolved
from vtr_export.schedule_yaml import Key

T = TypeVar("T")
Refuse = Callable[[Key, str, str], ScheduleError]


def fit_vision(
    reductions: Sequence[VisionReduction], model: T, refuse: Refuse
) -> tuple[Tower | None, T]:
    """The tower that ``reductions`` work on, and the model with the tokens that they leave.

    ``refuse`` makes the error for a place of the schedule, from a message and a way out.
    """
    if not reductions:
        return None, model
    tower = tower_of(model) if isinstance(model, ModelFacts) else None
    if tower is None:
        raise refuse(
            ("vision",),
            "this model's images do not become one square of tokens, projected one by one",
            f"leave vision out; it is for {', '.join(FAMILIES)}",
        )
    _check(reductions, tower, refuse)
    assert isinstance(model, ModelFacts), "it has a tower"
    if model.tokens_per_image is None:
        return tower, model
    left = Resolved(model.layers, None, (), vision=tuple(reductions), tower=tower)
    tokens = left.tokens_left if left.is_static else None
    return tower, replace(model, tokens_per_image=tokens)


def _check(reductions: Sequence[VisionReduction], tower: Tower, refuse: Refuse) -> None:
    """Each must fit what those before it leave."""
    for number, reduction in enumerate(reductions):
        if (why := reduction.misfit(tower)) is not None:
            raise refuse(("vision", number), *why)
        if reduction.form == "data-dependent" and number + 1 < len(reductions):
            raise refuse(
                ("vision", number),
                f"how many tokens {reduction.method} leaves depends on the image",
                "list it last",
            )
        if reduction.projects and number + 1 < len(reductions):
            raise refuse(
                ("vision", number),
                f"{reduction.method} works behind the projector",
                "list it last, or give it features where it can take them",
            )
        tower = reduction.leaves(tower)
