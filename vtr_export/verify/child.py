"""The process that verifies: it reads a job, and leaves its findings and its peak memory."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vtr_export.errors import VtrError
from vtr_export.process import peak_rss_bytes
from vtr_export.schedule import Cut, Keep, Resolved
from vtr_export.verify.check import Findings, Job, check

JOB, FINDINGS = "job.json", "findings.json"


def write_job(job: Job, folder: Path) -> None:
    """Put ``job`` where the child looks for it."""
    text = json.dumps(asdict(job), default=str)
    (folder / JOB).write_text(text, encoding="utf-8")


def read_job(folder: Path) -> Job:
    """The job that was put there."""
    data = json.loads((folder / JOB).read_text(encoding="utf-8"))
    schedule = data.pop("schedule")
    cuts = tuple(Cut(cut["before_layer"], Keep(**cut["keep"])) for cut in schedule.pop("cuts"))
    for name in ("artifact", "checkpoint", "image"):
        data[name] = None if data[name] is None else Path(data[name])
    crosses = tuple(schedule.pop("crosses"))
    return Job(schedule=Resolved(cuts=cuts, crosses=crosses, **schedule), **data)


def main(folder: Path) -> None:
    """Run the job of ``folder``. A user's mistake is a finding; ours keeps its traceback."""
    result: dict[str, Any]
    try:
        result = _plain(check(read_job(folder)))
    except VtrError as error:
        place = {"where": error.where, "hint": error.hint}
        result = {"error": type(error).__name__, "message": error.message, **place}
    result["peak_rss_bytes"] = peak_rss_bytes()
    (folder / FINDINGS).write_text(json.dumps(result), encoding="utf-8")


def _plain(findings: Findings) -> dict[str, Any]:
    gates = [gate.model_dump() for gate in findings.gates]
    return {"gates": gates, "warnings": findings.warnings, "golden": findings.golden}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
