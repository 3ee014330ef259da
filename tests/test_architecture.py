"""House rules as tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vtr_export
from vtr_export import errors

MAX_FILE, MAX_FUNCTION = 400, 60
SOURCES = sorted(Path(vtr_export.__path__[0]).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_files_and_functions_stay_small(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            length = (
                node.end_lineno - node.body[0].lineno
            )  # a command has as many options as it has
            assert length < MAX_FUNCTION, f"{node.name} is too long"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type)} - {"VtrError"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_error_shows_a_way_out(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ERRORS
        ):
            assert "hint" in {word.arg for word in node.keywords}, f"line {node.lineno}"


def test_the_package_imports_without_heavy_wheels() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "tensorrt", "transformers", "numpy")
    probe = f"import sys, vtr_export; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_list_of_rooms_has_each_with_its_first_line() -> None:
    package = Path(vtr_export.__path__[0])
    lines = (package / "README.md").read_text(encoding="utf-8").splitlines()
    listed = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    rooms = {}
    for init in package.glob("*/__init__.py"):
        words = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
        assert words is not None
        rooms[init.parent.name] = words.splitlines()[0]
    assert {name.lstrip("[").partition("]")[0]: words for name, words in listed} == rooms
