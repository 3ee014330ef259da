"""From prompts to tokens: one prefill, then one token a call until every row ends."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vtr_export.errors import InputError
from vtr_export.runtime.batch import Batch, Ints
from vtr_export.runtime.decoder import Cache
from vtr_export.runtime.images import Seen
from vtr_export.runtime.model import Model
from vtr_export.runtime.sampling import Options, Sampler
from vtr_export.runtime.session import Array

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Generated:
    """What the rows of one batch were answered."""

    tokens: tuple[tuple[int, ...], ...]  # of each row, without the token that ended it
    finish: tuple[Finish, ...]
    kept: tuple[tuple[Ints, ...], ...]  # by row and cut: which of the call's vision tokens survive
    cache: Cache  # knows all tokens but each row's last
    prefill_seconds: float
    decode_seconds: float
    steps: int  # decoder calls after the prefill


def left_to_say(answer: int | None, past: Ints) -> int | None:
    """How long an answer may be, where the model forgets what it said that long ago.

    InputError behind a first call, whose answer it would have to remember.
    """
    if answer is not None and past.any():
        raise InputError(
            "this model's layers forget what was said: it takes no second turn",
            hint="ask anew, in a prompt of its own",
        )
    return answer


def generate(
    model: Model,
    cache: Cache,
    rows: Sequence[Sequence[int]],
    features: Array | None,
    images: Sequence[Seen],
    options: Options,
    *,
    ends: Collection[int],
    limit: int,
    protected: NDArray[np.bool_] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generated:
    """Answer every row with at most ``limit`` tokens; ``on_token`` sees those of row 0.

    ``protected`` tells of the ``features`` which no cut drops.

    A row that ended is fed on until the others end; what follows is not reported.
    """
    start = time.perf_counter()
    sampler = Sampler(options, len(rows))
    tokens, ended = [list[int]() for _ in rows], [False] * len(rows)
    batch = model.pad(rows)
    step = model.prefill(cache, batch, features, images, protected=protected)
    kept = tuple(
        survivors(batch, step.kept, row)
        if step.numbers is None
        else followed(step.numbers[row], step.kept, row)
        for row in range(len(rows))
    )
    prefilled, steps = time.perf_counter(), 0
    while True:
        picked = sampler.pick(step.logits)
        for row, token in enumerate(picked.tolist()):
            ended[row] = ended[row] or token in ends
            if not ended[row]:
                tokens[row].append(token)
                if row == 0 and on_token is not None:
                    on_token(token)
        if all(ended) or steps + 1 == limit:
            break
        step, steps = model.extend(step.cache, picked), steps + 1
    return Generated(
        tokens=tuple(map(tuple, tokens)),
        finish=tuple("stop" if done else "length" for done in ended),
        kept=kept,
        cache=step.cache,
        prefill_seconds=prefilled - start,
        decode_seconds=time.perf_counter() - prefilled,
        steps=steps,
    )


def survivors(batch: Batch, kept: Sequence[Ints], row: int) -> tuple[Ints, ...]:
    """For each cut, the numbers of the row's vision tokens that are left after it.

    ``kept`` names columns of the stage before each cut; here they are followed to the call's own.
    """
    index = batch.vision_index[row]
    vision = index[batch.attention_mask[row, index] == 1]
    numbers = np.full(batch.input_ids.shape[1], -1)
    numbers[vision] = np.arange(len(vision))
    return followed(numbers, kept, row)


def followed(numbers: Ints, kept: Sequence[Ints], row: int) -> tuple[Ints, ...]:
    """For each cut, which ``numbers`` of a row's columns are left after it; -1 is none."""
    left = []
    for stage in kept:
        numbers = numbers[stage[row]]
        left.append(np.unique(numbers[numbers >= 0]))
    return tuple(left)
