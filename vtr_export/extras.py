"""Packages that only some commands need."""

import importlib
from typing import Any

from vtr_export.errors import UnavailableError


def require(module: str, extra: str, purpose: str) -> Any:
    """Import ``module``; UnavailableError names the extra where its package is not installed.

    ``purpose`` begins the message: "a picture".
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise UnavailableError(
            f"{purpose} needs {package!r}, which is not installed",
            hint=f"pip install 'vtr-export[{extra}]'",
        ) from error
