"""What can be exported: the page has every architecture, and its rows come out again."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

PAGE = Path(__file__).parents[1] / "samples" / "bench" / "coverage.md"
AGAIN = ("blip", "ovis2")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    return {name: rest for name, *rest in cells}


def test_the_page_has_every_architecture_once(rows: dict[str, list[str]]) -> None:
    assert list(rows) == list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def test_a_verdict_is_one_of_four_and_a_refusal_has_a_reason(rows: dict[str, list[str]]) -> None:
    for name, (verdict, way, detail) in rows.items():
        assert verdict in ("verified with cuts", "refused"), name
        assert way in ("config", "export", "family", "generic", "package"), name
        assert len(detail) > 5, name


def test_the_page_counts_its_rows(rows: dict[str, list[str]]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for verdict, count in Counter(cells[0] for cells in rows.values()).items():
        assert f"{count} {verdict}" in text


@pytest.mark.parametrize("name", AGAIN)
def test_a_row_comes_out_again(rows: dict[str, list[str]], name: str, tmp_path: Path) -> None:
    """In a process of its own, as the sweep does: an architecture changes what others see."""
    code = "import json, pathlib, sys; sys.path.append(sys.argv[3]); "
    code += "from coverage_one import examine; "
    code += "print(json.dumps(examine(sys.argv[1], pathlib.Path(sys.argv[2]))))"
    command = [sys.executable, "-c", code, name, tmp_path, Path(__file__).parent]
    done = subprocess.run(command, cwd=PAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [found["verdict"], found["way"]] == rows[name][:2]
