"""Every architecture that takes images and text: its pruned artifact beside transformers.

python samples/bench/coverage.py               all
python samples/bench/coverage.py llava aria    some; replaces their rows in coverage.md

A tiny random model of each (zoo.py) is exported with three cuts: 75 %, 50 % and 25 % of the vision
tokens before layers 1, 2 and 3. Its graphs in ONNX Runtime are held against transformers' own
`generate` (unpruned, two prompts of unlike length side by side, prefill and four decode steps) and
against the PyTorch reference (pruned, with its keep-sets). Families with a processor of their own
are taken from tests/tiny_families.py, and every gate of their export is measured. One process an
architecture.
"""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TESTS = HERE.parents[1] / "tests"
PAGE = HERE / "coverage.md"
VERDICTS = ("verified with cuts", "exported without", "refused", "failed", "silently wrong")
VERIFIED, WITHOUT, REFUSED, FAILED, WRONG = VERDICTS
CHILDREN = multiprocessing.get_context("fork")  # of a parent that has imported torch once
SECONDS = 900  # that one architecture may take
INTRODUCTION = """# What can be exported

Every entry of transformers' image-text-to-text mapping as a tiny random model with three cuts:
written by `python samples/bench/coverage.py`, which says what is compared. *Family*: facts, images
and prompts of its own, all gates; *generic*: what its config.json says, its model's own accessors,
one image of one size, and the parameter count is an estimate. *Refused*: before anything is
written, with this reason; *config*: already by `vtr doctor --model`.

"""


def main(names: list[str]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.append(str(TESTS))
    import coverage_one  # noqa: F401  the children need not import it again

    for name in names or architectures():
        found = examined(name)
        print(row(name, found), flush=True)
        update(name, row(name, found))
    print(PAGE.read_text(encoding="utf-8").split("\n\n")[2])


def update(name: str, new: str) -> None:
    """Put one row into the page, and count again."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
    rows = {line.split(" | ")[0][2:]: line for line in lines if line.startswith("| ")}
    rows[name] = new
    PAGE.write_text(page([rows[each] for each in architectures() if each in rows]), "utf-8")


def architectures() -> list[str]:
    """Of transformers' mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def examined(name: str) -> dict[str, Any]:
    """One architecture in a process of its own; whatever ends it is a verdict."""
    start = time.perf_counter()
    mine, theirs = CHILDREN.Pipe(duplex=False)
    child = CHILDREN.Process(target=_examine, args=(name, theirs))
    child.start()
    theirs.close()
    found = _failed(f"took more than {SECONDS} s")
    if mine.poll(SECONDS):
        try:
            found = mine.recv()
        except EOFError:
            found = _failed("its process died")
    child.kill()
    child.join()
    return {**found, "seconds": round(time.perf_counter() - start)}


def _examine(name: str, result: Connection) -> None:
    from coverage_one import examine

    with tempfile.TemporaryDirectory() as folder:
        try:
            result.send(examine(name, Path(folder)))
        except Exception as error:  # whatever it is, the row says so
            if os.environ.get("VTR_COVERAGE_TRACE"):
                traceback.print_exc()
            result.send(_failed(f"{type(error).__name__}: {error}"[:300]))


def _failed(why: str) -> dict[str, Any]:
    return {"verdict": FAILED, "way": "", "detail": " ".join(why.split())}


def row(name: str, found: dict[str, Any]) -> str:
    """Of the table."""
    detail = found["detail"].replace("|", "/")
    return f"| {name} | {found['verdict']} | {found['way']} | {detail} |"


def page(rows: list[str]) -> str:
    """The whole page."""
    counts = Counter(line.split(" | ")[1] for line in rows)
    said = ", ".join(f"{counts[kind]} {kind}" for kind in VERDICTS)
    head = f"{len(rows)} architectures of transformers {version('transformers')}: {said}.\n\n"
    table = "| architecture | verdict | way | detail |\n| --- | --- | --- | --- |\n"
    return INTRODUCTION + head + table + "".join(f"{line}\n" for line in rows)


if __name__ == "__main__":
    main(sys.argv[1:])
