"""An export compiler that drops vision tokens inside the decoder, layer by layer."""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vtr_export.errors import GateError, VtrError
    from vtr_export.exporter import Report, export
    from vtr_export.runtime.artifact import Answer, Artifact
    from vtr_export.runtime.conversation import Conversation
    from vtr_export.schedule import Schedule

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Artifact",
    "Conversation",
    "GateError",
    "Report",
    "Schedule",
    "VtrError",
    "export",
]
_HOMES: Final = {
    "Answer": "vtr_export.runtime.artifact",
    "Artifact": "vtr_export.runtime.artifact",
    "Conversation": "vtr_export.runtime.conversation",
    "GateError": "vtr_export.errors",
    "Report": "vtr_export.exporter",
    "Schedule": "vtr_export.schedule",
    "VtrError": "vtr_export.errors",
    "export": "vtr_export.exporter",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
