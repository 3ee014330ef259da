"""``vtr doctor``: what works on this machine, and the command that mends what does not."""

from typing import Annotated

import typer

from vtr_export.cli.output import Json, columns, report


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Say what exporting it would meet, from its config alone."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what works here, and how to mend what does not."""
    from vtr_export.doctor import examine, foresee

    checks = examine()
    values = {
        "ok": all(check.ok is not False for check in checks),
        "checks": [c.to_json() for c in checks],
    }
    lines = columns([(check.mark, check.name, check.found) for check in checks])
    lines += [f"{check.name}: {check.remedy}" for check in checks if check.remedy]
    if model is not None:
        outlook = foresee(model)
        values["model"] = outlook.to_json()
        lines += ["", *columns(outlook.rows()), *outlook.remarks]
    report(values, lines, as_json)
