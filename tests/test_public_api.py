"""What ``import vtr_export`` offers."""

import subprocess
import sys

import pytest

import vtr_export

PUBLIC = [
    "Answer",
    "Artifact",
    "Conversation",
    "GateError",
    "Report",
    "Schedule",
    "VtrError",
    "export",
]


def test_the_public_names_are_these() -> None:
    assert vtr_export.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(vtr_export))
    assert vtr_export._HOMES.keys() == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_what_it_says_and_has_a_docstring(name: str) -> None:
    value = getattr(vtr_export, name)
    assert value.__name__ == name
    assert value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="exprot"):
        vtr_export.exprot  # noqa: B018 -- the access is the test


def test_importing_the_package_or_its_errors_imports_no_wheel() -> None:
    probe = (
        "import sys; before = set(sys.modules); import vtr_export; vtr_export.VtrError; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'vtr_export'}))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_running_an_artifact_imports_neither_torch_nor_transformers() -> None:
    probe = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "import vtr_export; vtr_export.Artifact, vtr_export.Conversation, vtr_export.Schedule, "
        "vtr_export.export"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)
