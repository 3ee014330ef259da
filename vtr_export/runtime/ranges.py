"""What the optimisation profiles of an engine take, and which of them serves a call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vtr_export.errors import InputError

Numbers = tuple[int, ...]

BATCH, VISION, TEXT, NEW = (
    "--max-batch", "--max-vision-tokens", "--max-text-tokens", "--max-new-tokens",
)  # fmt: skip
IMAGES: Final = f"{BATCH} or {VISION}"  # rows, or images of a row
_FLAGS: Final = (
    ("pixel_values", 0, IMAGES),
    ("qformer_", 1, TEXT),
    ("vision_index", 1, VISION),
    ("protected", 1, VISION),
    ("inputs_embeds", 1, TEXT),
    ("position_ids", 1, TEXT),
    ("attention_mask", 1, NEW),
    ("past_key_values.", 2, NEW),
    ("past_mask.", 1, NEW),
)  # beginning of an input's name, its axis, the flag of ``vtr build`` that widens it
_ORDER: Final = (BATCH, IMAGES, VISION, TEXT, NEW, "")  # a cause before what follows from it


@dataclass(frozen=True)
class Range:
    """Least and most of each dimension of an input, or of its values where it holds shapes."""

    least: Numbers
    most: Numbers


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: ranges by input. ``values``: of inputs that hold shapes."""

    shapes: Mapping[str, Range]
    values: Mapping[str, Range]


@dataclass(frozen=True)
class Misfit:
    """A number that a profile does not take. ``axis`` None: a value, not a dimension."""

    name: str
    axis: int | None
    got: int
    least: int
    most: int

    @property
    def flag(self) -> str:
        """What widens it; empty where no flag does."""
        if self.got < self.least or self.axis is None:
            return ""
        if self.axis == 0 and self.name != "pixel_values":
            return BATCH
        return next((f for n, a, f in _FLAGS if self.name.startswith(n) and a == self.axis), "")

    def __str__(self) -> str:
        what = "a value" if self.axis is None else f"dimension {self.axis}"
        return f"{self.name}: {what} is {self.got}, the engine takes {self.least} to {self.most}"


def choose(
    profiles: Sequence[Profile],
    shapes: Mapping[str, Numbers],
    values: Mapping[str, Numbers],
    where: str,
) -> int:
    """The number of the last profile that takes the call: generation before context.

    InputError naming input, range and flag when none does.
    """
    nearest: list[Misfit] | None = None
    for number in reversed(range(len(profiles))):
        found = misfits(profiles[number], shapes, values)
        if not found:
            return number
        if nearest is None or len(found) < len(nearest):
            nearest = found
    worst = min(nearest or [], key=lambda misfit: _ORDER.index(misfit.flag))
    raise InputError(f"outside of the engine's profile: {worst}", where=where, hint=_hint(worst))


def misfits(
    profile: Profile, shapes: Mapping[str, Numbers], values: Mapping[str, Numbers]
) -> list[Misfit]:
    """What ``profile`` does not take, in the order of its inputs."""
    found = [
        misfit
        for name, allowed in profile.shapes.items()
        for misfit in _outside(name, shapes[name], allowed, are_sizes=True)
    ]
    for name, allowed in profile.values.items():
        found += _outside(name, values[name], allowed, are_sizes=False)
    return found


def _outside(name: str, given: Numbers, allowed: Range, *, are_sizes: bool) -> list[Misfit]:
    if len(given) != len(allowed.least):
        raise InputError(
            f"{name} has {len(given)} dimensions, the engine takes {len(allowed.least)}",
            hint="run it with the vtr-export that built it",
        )
    return [
        Misfit(name, axis if are_sizes else None, got, least, most)
        for axis, (got, least, most) in enumerate(
            zip(given, allowed.least, allowed.most, strict=True)
        )
        if not least <= got <= most
    ]


def _hint(misfit: Misfit) -> str:
    if misfit.flag:
        return f"ask for less, or build for more: vtr build ARTIFACT with a larger {misfit.flag}"
    if misfit.got < misfit.least:
        return "no flag of vtr build widens it downwards: give as much as the engine takes"
    return "no flag of vtr build widens it: it is the model's own"
