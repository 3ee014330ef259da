"""Run ``vtr`` in this process, as its entry point would."""

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest

from vtr_export.cli import main


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


def vtr(*arguments: object, entry: Callable[[], None] = main) -> Done:
    """Exit status and output; an unexpected exception comes through."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["vtr", *map(str, arguments)]
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch.object(sys, "argv", argv),
        pytest.raises(SystemExit) as stop,
    ):
        entry()
    return Done(int(stop.value.code or 0), out.getvalue(), err.getvalue())
