"""Which reduction is worth it on the digits sample: writes methods.md, methods.svg, methods.json.

python samples/bench/methods.py

Draws 1,200 held-out questions (those that no search has seen) and hands them to
``vtr bench methods``, with the sample's own searched schedules beside the methods; then writes the
README's table. ``--tiny`` asks a few and times little; other options are the command's.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DIGITS = Path("samples", "digits")
VTR = ("-c", "from vtr_export.cli import main; main()", "bench", "methods")
TINY = ("--limit", "12", "--repeats", "1", "--steps", "2", "--share", "0.25",
        "--method", "FastV")  # fmt: skip


def main() -> None:
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(__doc__)
        run(*VTR, "--help")
        return
    is_tiny = "--tiny" in words
    rest = [*(TINY if is_tiny else ()), *(word for word in words if word != "--tiny")]
    with TemporaryDirectory(prefix="vtr-methods-") as folder:
        held = Path(folder) / "held"
        count = ("--questions", "12" if is_tiny else "1200")
        run(DIGITS / "calibration.py", "--out", held, "--evaluation", *count)
        out = ("--out", folder if is_tiny else HERE.relative_to(ROOT))
        lists = [DIGITS / f"{name}.yaml" for name in ("gsearch", "psigmoid")]
        given = [word for one in lists for word in ("--schedule", one)]
        new = ("--max-new-tokens", 4)
        run(
            *VTR,
            *(DIGITS / "model", "--questions", held, *given, *new, *out, *rest),
        )
    if not is_tiny:
        run(Path("samples", "support", "table.py"))  # the README's


def run(*words: object) -> None:
    """A program of this interpreter, in the repository's root; leaves with it when it fails."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
