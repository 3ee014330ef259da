"""Numbers of tokens as schedules spell them: an integer, or an exact share."""

import re
from fractions import Fraction
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from vtr_export.schedule_yaml import show

MAX_PART: Final = 1_000_000  # of a fraction: tokens x numerator stays far inside int64
_PERCENT: Final = re.compile(r"([0-9]{1,9})(\.[0-9]{1,9})?%")
_RATIO: Final = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")
_FORMS: Final = "write an integer (144), a percentage (25%) or a fraction (1/4)"


def refuse(message: str, hint: str) -> PydanticCustomError:
    """What a validator raises: a message and a way out."""
    return PydanticCustomError("vtr", "{message}", {"message": message, "hint": hint})


def read_keep(value: object) -> int | Fraction:
    """Tokens per image, or an exact share of them; floats are refused, they are not exact."""
    if isinstance(value, float):
        exact = f"{value * 100:g}%" if 0 <= value <= 1 else "50%"
        raise refuse(f"keep is {show(value)}, a float, which is not exact", f"write {exact}")
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value <= MAX_PART:
            raise refuse(f"keep is {value}", f"write 0 (drop all) to {MAX_PART}")
        return value
    share = read_share(value) if isinstance(value, str) else value
    if not isinstance(share, Fraction):
        raise refuse(f"keep is {show(value)}, not a number of tokens", _FORMS)
    if not 0 <= share <= 1:
        raise refuse(f"keep is {show(value)}, outside 0 to 100%", "a cut can only drop tokens")
    if share.denominator > MAX_PART:
        raise refuse(f"keep is {show(value)}, too fine", f"use a denominator up to {MAX_PART}")
    return share


def read_share(text: str) -> Fraction | None:
    """``12.5%`` or ``1/8`` exactly; None for anything else."""
    if match := _PERCENT.fullmatch(text):
        return Fraction(match[1] + (match[2] or "")) / 100
    match = _RATIO.fullmatch(text)
    return Fraction(int(match[1]), int(match[2])) if match and int(match[2]) else None


def write_keep(keep: int | Fraction) -> int | str:
    """The spelling that ``read_keep`` reads back."""
    if isinstance(keep, int):
        return keep
    if MAX_PART % keep.denominator:
        return f"{keep.numerator}/{keep.denominator}"
    digits = keep.numerator * (MAX_PART // keep.denominator)  # millionths
    whole, rest = divmod(digits, 10_000)
    return f"{whole}" + (f".{rest:04}".rstrip("0") if rest else "") + "%"


_KEEP_SCHEMA: Final = {
    "description": "Vision tokens per image, or an exact share of them: 144, 25%, 1/4.",
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": MAX_PART},
        {"type": "string", "pattern": r"^[0-9]{1,9}((\.[0-9]{1,9})?%|/[0-9]{1,9})$"},
    ],
}
KeepValue = Annotated[
    int | Fraction,
    PlainValidator(read_keep),
    PlainSerializer(write_keep),
    WithJsonSchema(_KEEP_SCHEMA),
]


class StrictModel(BaseModel):
    """A part of a schedule: nothing unknown, nothing converted, nothing changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def tokens_of(keep: int | Fraction, tokens: int) -> int:
    """``keep`` of ``tokens``, a share rounded down; never more than there are."""
    if isinstance(keep, int):
        return min(keep, tokens)
    return tokens * keep.numerator // keep.denominator
