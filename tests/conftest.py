"""Options and fixtures of every test: goldens that only a developer rewrites, traced tiny models."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from cut_graphs import Traced, Tracer

Golden = Callable[[ir.Model, Path], None]

settings.register_profile("vtr", deadline=None, derandomize=True, database=None)
settings.load_profile("vtr")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-goldens",
        action="store_true",
        help="write graphs/*/*/after.onnxtxt anew (developers only; review the diff)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-goldens") and os.environ.get("CI"):
        raise pytest.UsageError("CI compares goldens and never writes them")


def golden_text(model: ir.Model) -> str:
    """The nodes, one a line, and the signature, one value a line.

    Our functions are files of their own in ``graphs/ops``; inferred shapes and the names of nodes
    only make a diff longer.
    """
    clone = model.clone()
    clone.functions.clear()
    outputs = set(clone.graph.outputs)
    for node in clone.graph:
        node.name = None
        for value in set(node.outputs) - outputs:
            value.type = value.shape = None
    text = ir.to_onnx_text(clone, exclude_initializers=True)
    lines = [_broken(line) if " => (" in line else line for line in text.splitlines()]
    return "\n".join(lines) + "\n"


def _broken(signature: str) -> str:
    """``name (inputs) => (outputs)`` with a value a line."""
    lines = re.sub(r", (?=[a-z0-9]+\[)", ",\n   ", signature)
    return re.sub(r"(?<= )\((?=[a-z])", "(\n   ", lines).replace(") => ", "\n) => ")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare a model with the text it should have become; fails on a missing file."""
    update = bool(request.config.getoption("--update-goldens"))

    def compare(model: ir.Model, path: Path) -> None:
        text = golden_text(model)
        if update:
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing: pytest --update-goldens writes it"
        written = ir.from_onnx_text(path.read_text(encoding="utf-8"))
        # printed again: another version of onnx may write the same graph in another way
        assert text.splitlines() == golden_text(written).splitlines()

    return compare


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> "Tracer":
    """A tiny model of a variant (``cut_graphs.VARIANTS``), traced once a session."""
    from cut_graphs import trace  # brings torch, which not every test needs

    folder = tmp_path_factory.mktemp("traced")
    known: dict[str, Traced] = {}

    def get(variant: str) -> "Traced":
        if variant not in known:
            known[variant] = trace(variant, folder)
        return known[variant]

    return get
