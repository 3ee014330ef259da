"""The front page: its commands run, its table is up to date, its links lead somewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_families import TINY

from vtr_export.families import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {"venv", ".venv", "out", "build"} & set(path.relative_to(ROOT).parts)
)
SETUP = ("python3 -m venv ", ". .venv/", "pip install ")  # done before a test can run
OURSELVES = ("pre-commit ", "pytest ")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[tuple[str, list[str]]]:
    """Each command (``$``; a line that ends with ``&&`` goes on) and the lines shown under it."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found[-1][0].endswith("&&"):
            found[-1] = (f"{found[-1][0]} {line.strip()}", [])
        else:
            found[-1][1].append(line)
    return found


def steps(command: str) -> list[str]:
    return [step.strip() for step in command.split("&&")]


CONSOLE = [pair for block in blocks("console") for pair in commands(block)]
SETUPS = [steps(command) for command, _ in CONSOLE if steps(command)[0].startswith(SETUP)]


def run(script: str, folder: Path) -> str:
    """Its stdout, with this Python's commands found first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", script]
    env = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def missing(shown: list[str], said: str) -> list[str]:
    """Shown lines that were not said, in order; ``…`` stands for anything."""
    lines, absent = iter(said.splitlines()), []
    for line in shown:
        pattern = ".*".join(re.escape(part) for part in line.split("…"))
        if not any(re.fullmatch(pattern, other) for other in lines):
            absent.append(line)
    return absent


@pytest.mark.skipif(shutil.which("bash") is None, reason="the README speaks bash")
def test_every_command_of_the_readme_does_what_it_shows(tmp_path: Path) -> None:
    """One test, because each command uses what those before it made."""
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    ran = 0
    for command, shown in CONSOLE:
        kept = [step for step in steps(command) if not step.startswith((*SETUP, *OURSELVES))]
        if kept:
            assert missing(shown, run(" && ".join(kept), tmp_path)) == [], command
            ran += len(kept)
    assert ran >= 5
    for block in blocks("python"):
        run(f"python - <<'END'\n{block}END", tmp_path)
    check_picture(tmp_path / "out" / "kept.png")
    check_record(tmp_path / "out" / "digits")


def check_picture(drawn: Path) -> None:
    """The shipped picture shows what this model keeps, but for a near tie or a font."""
    with Image.open(drawn) as ours, Image.open(ROOT / "samples/digits/kept.png") as shipped:
        assert ours.size == shipped.size
        difference = np.abs(np.asarray(ours, np.int16) - np.asarray(shipped, np.int16))
    assert (difference.max(axis=-1) > 16).mean() < 0.03


def check_record(artifact: Path) -> None:
    """What a CPU was recorded to answer is what the artifact answers here, near ties aside."""
    from vtr_export import Artifact
    from vtr_export.runtime.artifact import Request

    digits = ROOT / "samples" / "digits"
    lines = (digits / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    asked = [Request(row["question"], [digits / row["image"]]) for row in rows]
    given = Artifact.load(artifact).generate_batch(asked)
    right = sum(said.text in row["answers"] for said, row in zip(given, rows, strict=True))
    recorded = [r["runs"]["fp32"]["answers"] for r in RECORDS if r["device"] == "cpu"]
    assert recorded
    for each in recorded:
        assert each["questions"] == len(rows) == 128
        assert abs(each["right"] - right) <= 2


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    wanted = next(found for found in SETUPS if found[-1].startswith("pytest"))
    lines = script.splitlines()
    assert [line for line in lines if line.startswith((*SETUP, ". .ci/", *OURSELVES))] == [
        step.replace(".venv", ".ci/venv") for step in wanted
    ]


# --- the support table -------------------------------------------------------------------------

SUPPORT = ROOT / "samples" / "support"
RECORDS = [json.loads(path.read_text(encoding="utf-8")) for path in SUPPORT.glob("*.json")]


def cells(family: str) -> dict[str, str]:
    lines = README.partition("table.py -->")[2].splitlines()
    head, row = (
        next(line for line in lines if line.startswith(f"| {first} |"))
        for first in ("family", family)
    )
    names, values = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (head, row))
    return dict(zip(names, values, strict=True))


def test_the_support_table_is_what_its_command_writes(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    stale = README.replace("| llava |", "| stale |").replace("| unpruned |", "| stale |")
    copy.write_text(stale, encoding="utf-8")
    run(f"python {SUPPORT / 'table.py'} {copy}", ROOT)
    assert copy.read_text(encoding="utf-8") == README


@pytest.mark.parametrize("family", sorted({record["family"] for record in RECORDS}))
def test_the_table_claims_what_was_recorded_and_no_more(family: str) -> None:
    row = cells(family)
    own = [record for record in RECORDS if record["family"] == family]
    for column, device, target in (
        ("ONNX Runtime CPU", "cpu", "onnxruntime"),
        ("ONNX Runtime CUDA", "cuda", "onnxruntime"),
        ("TensorRT runs", "cuda", "tensorrt"),
    ):
        ran = {
            dtype
            for record in own
            if record["device"] == device and record["target"].removesuffix("-rtx") == target
            for dtype, run in record["runs"].items()
            if run["answers"]
        }
        assert set(re.findall(r"fp32|fp16|bf16", row[column])) == ran
    built = {dtype for r in own for dtype, run in r["runs"].items() if run["build"]}
    assert set(re.findall(r"fp32|fp16|bf16", row["TensorRT builds"])) == built
    for record in own:
        is_named = record["runtime"] in row["executed on"]
        assert is_named == any(run["answers"] for run in record["runs"].values())
    if not own:
        assert row["executed on"] == "not run yet"


def test_every_family_has_a_row_whose_gates_all_passed() -> None:
    recorded = json.loads((ROOT / "samples" / "bench" / "families.json").read_text())["families"]
    assert {one["model_type"] for one in recorded.values()} <= set(FAMILIES)
    assert recorded.keys() == TINY.keys()
    assert all(one["passed"] == one["gates"] > 20 for one in recorded.values())


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["target"])
def test_what_is_recorded_has_passed_or_says_why_not(record: dict[str, Any]) -> None:
    """By whom it was recorded stands nowhere in it, and no folder of theirs."""
    assert record["verdict"] == "passed" or record["verdict"].startswith("built, not executed: ")
    for run in record["runs"].values():
        assert run["export"]["verified"]
        assert run["failed"] is None
        assert (run["answers"] is not None) == (record["verdict"] == "passed")
    assert re.findall(r"(?<![\w.])/\w+/", json.dumps(record)) == []


# --- links and paths ---------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_name_no_place_of_one_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.])/(?:home|root|work|opt|mnt|Users)/\S*", text) == []


def test_files_that_are_named_in_the_readme_exist() -> None:
    named = re.findall(r"(?<![\w/.])(?:samples|tests|graphs|vtr_export)/[\w./-]+\w", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
