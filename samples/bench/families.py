"""Every family, tiny and random: is its artifact what transformers says, and what its export takes.

python samples/bench/families.py               all; writes families.json and the README's table
python samples/bench/families.py llava         some; writes nothing

A checkpoint of each is made from its real configuration class with its real processor, exported
with three cuts (75 %, 50 % and 25 % of the vision tokens before layers 1, 2 and 3), and every gate
is measured. Seconds and peak memory are the export's, imports included, the verification not.
"""

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from measure import HERE, MIB, export_verified, head, machine, python, say, table, work

RECORD = HERE / "families.json"
TESTS = HERE.parents[1] / "tests"
SUPPORT = HERE.parent / "support" / "table.py"


def main(names: list[str]) -> None:
    if names[:1] == ["save"]:
        sys.path.insert(0, str(TESTS))
        from tiny_families import TINY, stages

        folder = Path(names[2])
        model = TINY[names[1]](folder, 0)
        print(json.dumps({"class": type(model).__name__, "schedule": stages(folder)}))
        return
    chosen = names or every()
    with work(None) as folder:
        found = {name: measured(name, folder / name.replace("/", "-")) for name in chosen}
    rows = [("family", "class", "gates", "export s", "peak MiB"), *map(row, found.items())]
    print(head("tiny random models, fp32, ONNX Runtime CPU"), table(rows), sep="\n")
    if not names:
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "transformers": version("transformers"),
            "families": found,
        }
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        subprocess.run([sys.executable, SUPPORT], check=True)


def every() -> list[str]:
    """The names of the tiny families."""
    code = "import json, tiny_families; print(json.dumps(list(tiny_families.TINY)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS, capture_output=True, check=True)
    return list(json.loads(done.stdout))


def measured(name: str, folder: Path) -> dict:
    """One family's export."""
    say(name)
    folder.mkdir()
    saved = python("families.py", "save", name, folder / "model").report
    schedule = folder / "schedule.yaml"
    schedule.write_text(json.dumps(saved["schedule"]))
    report = export_verified(folder / "model", folder / "out", schedule).report
    config = json.loads((folder / "model" / "config.json").read_text())
    return {
        "class": saved["class"],
        "model_type": config["model_type"],
        "gates": len(report["gates"]),
        "passed": sum(gate["passed"] for gate in report["gates"]),
        "export_seconds": round(report["seconds"] - verifying(report["steps"]), 1),
        "peak_mib": round(report["peak_rss_bytes"] / MIB),
    }


def verifying(steps: dict[str, float]) -> float:
    return sum(seconds for step, seconds in steps.items() if step.startswith("verify"))


def row(item: tuple[str, dict]) -> tuple[object, ...]:
    name, found = item
    gates = f"{found['passed']} of {found['gates']}"
    return name, found["class"], gates, found["export_seconds"], found["peak_mib"]


if __name__ == "__main__":
    main(sys.argv[1:])
