"""Methods of the literature in plain PyTorch, each from its definition; one file, one method.

A method of ``REDUCE`` is given one image as its tower saw it. One of ``INSIDE`` works in the tower:
``method(reduction, model, tower)`` is a context in which transformers' layers do as it says, and
gives a function from what the projector is given to what is left.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from typing import Any, Final

from vtr_export.reductions import Tower
from vtr_export.reductions.registry import REFERENCES
from vtr_export.reference.reductions import (
    divprune,
    fastervlm,
    ficoco_v,
    focusllava,
    mustdrop,
    pixel_shuffle,
    pool,
    prumerge,
    visionzip,
    vispruner,
)
from vtr_export.reference.reductions.seen import Reduced, Seen

_OURS: Final[Mapping[str, Callable[[Any, Seen], Reduced]]] = {
    "fastervlm": fastervlm.reduce,
    "prumerge": prumerge.reduce,
    "prumerge+": prumerge.reduce,
    "vispruner": vispruner.reduce,
}
REDUCE: Final[Mapping[str, Callable[[Any, Seen], Reduced]]] = {
    **{point.name: point.load() for point in entry_points(group=REFERENCES)},
    **_OURS,
}
INSIDE: Final[
    Mapping[str, Callable[[Any, Any, Tower], AbstractContextManager[Callable[[Seen], Reduced]]]]
] = {
    "divprune": divprune.inside,
    "pixel_shuffle": pixel_shuffle.inside,
    "pool": pool.inside,
    "visionzip": visionzip.inside,
    "ficoco_v": ficoco_v.inside,
    "mustdrop": mustdrop.inside,
    "focusllava": focusllava.inside,
}
