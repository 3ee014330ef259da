"""The methods there are: ours, and those that installed packages bring."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, Union

from pydantic import Discriminator, Tag

from vtr_export.errors import ScheduleError
from vtr_export.reductions.divprune import DivPrune
from vtr_export.reductions.fastervlm import FasterVLM
from vtr_export.reductions.ficoco_v import FiCoCoV
from vtr_export.reductions.mustdrop_cache import OutputAwareCache
from vtr_export.reductions.prumerge import PruMerge, PruMergePlus
from vtr_export.reductions.reduction import Reduction, VisionReduction
from vtr_export.reductions.visionzip import VisionZip
from vtr_export.reductions.vispruner import VisPruner

GROUP: Final = "vtr_export.reductions"
OURS: Final[tuple[type[Reduction], ...]] = (
    DivPrune,
    FasterVLM,
    FiCoCoV,
    OutputAwareCache,
    PruMerge,
    PruMergePlus,
    VisionZip,
    VisPruner,
)


def _named(kind: type[Reduction]) -> str:
    """What a schedule calls it."""
    return str(kind.model_fields["method"].default)


def _brought() -> list[type[Reduction]]:
    """Those of other packages; ScheduleError for an entry point that is none."""
    found = []
    for point in entry_points(group=GROUP):
        kind = point.load()
        if not (isinstance(kind, type) and issubclass(kind, Reduction)):
            raise ScheduleError(
                f"the entry point {point.name!r} of {GROUP} is no Reduction",
                where=point.value,
                hint="uninstall the package that brings it, or see vtr_export/ops/README.md",
            )
        found.append(kind)
    return found


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
