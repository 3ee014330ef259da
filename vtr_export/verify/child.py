"""The process that verifies: it reads a job, and leaves its findings and its peak memory."""

import json
import sys
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from vtr_export.errors import VtrError
from vtr_export.process import peak_rss_bytes
from vtr_export.verify.check import Findings, Job, check

JOB, FINDINGS = "job.json", "findings.json"
_JOBS: Final = TypeAdapter(Job)


def write_job(job: Job, folder: Path) -> None:
    """Put ``job`` where the child looks for it."""
    (folder / JOB).write_bytes(_JOBS.dump_json(job))


def read_job(folder: Path) -> Job:
    """The job that was put there."""
    return _JOBS.validate_json((folder / JOB).read_bytes())


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
