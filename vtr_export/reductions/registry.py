"""The methods there are: ours, and those that installed packages bring."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, Union

from pydantic import Discriminator, Tag

from vtr_export.errors import InputError, ScheduleError
from vtr_export.reductions.divprune import DivPrune
from vtr_export.reductions.fastervlm import FasterVLM
from vtr_export.reductions.ficoco_v import FiCoCoV
from vtr_export.reductions.focusllava import FocusLLaVA
from vtr_export.reductions.mustdrop import MustDrop
from vtr_export.reductions.mustdrop_cache import OutputAwareCache
from vtr_export.reductions.pixel_shuffle import PixelShuffle
from vtr_export.reductions.pool import Pool
from vtr_export.reductions.prumerge import PruMerge, PruMergePlus
from vtr_export.reductions.reduction import Reduction, VisionReduction
from vtr_export.reductions.visionzip import VisionZip
from vtr_export.reductions.vispruner import VisPruner

GROUP: Final = "vtr_export.reductions"
REFERENCES: Final = "vtr_export.references"
HOW: Final = "vtr_export/ops/README.md"
OURS: Final[tuple[type[Reduction], ...]] = (
    DivPrune,
    FasterVLM,
    FiCoCoV,
    FocusLLaVA,
    MustDrop,
    OutputAwareCache,
    PixelShuffle,
    Pool,
    PruMerge,
    PruMergePlus,
    VisionZip,
    VisPruner,
)


def _named(kind: type[Reduction]) -> str:
    """What a schedule calls it."""
    return str(kind.model_fields["method"].default)


def _brought() -> list[type[Reduction]]:
    """Those of other packages; ScheduleError for an entry point that is none, or none of its own.

    Only reductions before the decoder: what writes the others into a graph is ours.
    """
    found = dict[str, type[Reduction]]()
    for point in entry_points(group=GROUP):
        kind = point.load()
        if not (isinstance(kind, type) and issubclass(kind, VisionReduction)):
            raise ScheduleError(
                f"the entry point {point.name!r} of {GROUP} is no VisionReduction",
                where=point.value,
                hint=f"uninstall the package that brings it, or see {HOW}",
            )
        if _named(kind) in {*found, *map(_named, OURS)}:
            raise ScheduleError(
                f"the entry point {point.name!r} of {GROUP} brings {_named(kind)!r} again",
                where=point.value,
                hint="uninstall one of the packages that bring it, or name it otherwise",
            )
        found[_named(kind)] = kind
    return list(found.values())


def check_references(reductions: Iterable[Reduction]) -> None:
    """InputError for a reduction that no definition stands beside: it cannot be verified."""
    known = {*map(_named, OURS), *(point.name for point in entry_points(group=REFERENCES))}
    for one in reductions:
        if one.method not in known:
            raise InputError(
                f"{one.method} cannot be verified: its package brings no definition of it",
                where=type(one).__module__,
                hint=f"an entry point {one.method!r} of {REFERENCES} ({HOW}), or --no-verify",
            )


def operator_folders() -> list[Path]:
    """Where other packages have operators of their own: ``graphs`` beside a reduction's module."""
    files = (inspect.getsourcefile(kind) for kind in KINDS if kind not in OURS)
    return [folder for file in files if file and (folder := Path(file).parent / "graphs").is_dir()]


def _method(value: Any) -> Any:
    """What a list's entry says it is."""
    return value.get("method") if isinstance(value, dict) else getattr(value, "method", None)


def _union(kinds: Mapping[str, type[Reduction]]) -> Any:
    """One of them, told by ``method``."""
    members = tuple(Annotated[kind, Tag(name)] for name, kind in kinds.items())
    return Annotated[Union[members], Discriminator(_method)]  # noqa: UP007 -- of a tuple


KINDS: Final = (*OURS, *_brought())
VISION: Final = {_named(kind): kind for kind in KINDS if issubclass(kind, VisionReduction)}
CACHE: Final = {_named(kind): kind for kind in KINDS if not issubclass(kind, VisionReduction)}
if TYPE_CHECKING:
    Vision: TypeAlias = VisionReduction
    Decode: TypeAlias = Reduction
else:
    Vision, Decode = _union(VISION), _union(CACHE)
