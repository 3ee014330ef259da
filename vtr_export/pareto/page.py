"""A comparison as files: numbers (JSON), one table (Markdown), one picture (SVG)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vtr_export.errors import InputError
from vtr_export.pareto.measured import Point, Report, front
from vtr_export.pareto.plot import draw

NAME: Final = "methods"
HEAD: Final = (
    "tokens",
    "method",
    "left",
    "accuracy",
    "points lost, 95 %",
    "MFLOPs",
    "of all",
    "first token",
    "of unpruned",
    "next token",
    "of unpruned",
    "peak",
)
NOTES: Final = (
    "*tokens*: the share that was asked for; *left*: what entered the decoder's layers, their mean "
    "(`methods.json` has it layer by layer, and every schedule). *own*: as many as the image or "
    "the given schedule says.",
    "*MFLOPs* and *first token*: vision encoder, the reduction itself and the decoder's prefill; "
    "preparing the image is left out. **Bold**: no other row is as accurate for fewer FLOPs; "
    "*italic*: none is in less time.",
    "Ratios are medians of rounds in which a method and the unpruned model answer the same "
    "question in turns. *peak*: of a process that opens the artifact and answers one question.",
)


def write(report: Report, folder: Path) -> None:
    """``methods.json``, ``.md`` and ``.svg``; InputError where they cannot be written."""
    try:
        draw(report, folder / f"{NAME}.svg")
        (folder / f"{NAME}.md").write_text(markdown(report), encoding="utf-8")
        text = json.dumps(report.to_json(), indent=1) + "\n"
        (folder / f"{NAME}.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write the comparison: {error.strerror or error}",
            where=str(folder),
            hint="check --out",
        ) from None


def markdown(report: Report) -> str:
    """Command, machine, picture, table, and what was refused."""
    parts = [
        "# Which reduction is worth it",
        f"{report.date} `{report.command}`",
        f"{report.machine}; {report.threads} thread{'s' * (report.threads > 1)}; "
        f"{report.questions} questions of {report.model} ({report.metric}), "
        f"{report.text_tokens:.0f} text tokens; {report.repeats} rounds, {report.steps} steps.",
        f"![accuracy against FLOPs and against time to the first token]({NAME}.svg)",
        table(_sorted(report.points), report.points),
        "\n\n".join(NOTES),
    ]
    if report.refusals:
        parts += ["## Not in the table", _refusals(report)]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Point], among: Sequence[Point]) -> str:
    """Markdown of some points; marks are of the fronts of ``among``."""
    cheap, quick = front(among, "flops"), front(among, "first_ratio")
    lines = [HEAD, ("---",) * len(HEAD)]
    lines += [_cells(point, point in cheap, point in quick) for point in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sorted(points: Sequence[Point]) -> list[Point]:
    """As asked, the most accurate first."""
    whole, *others = points
    return [whole, *sorted(others, key=lambda one: (-(one.asked or 0), -one.accuracy))]


def _cells(point: Point, is_cheap: bool, is_quick: bool) -> tuple[str, ...]:
    mark = "**" * is_cheap + "*" * is_quick
    mean, low, high = (100 * value for value in point.lost)
    lost = "" if point.phase == "none" else f"{mean:.1f} ({low:.1f} to {high:.1f})"
    return (
        share_of(point),
        f"{mark}{point.method}{mark[::-1]}",
        f"{point.share:.1%}",
        f"{point.accuracy:.1%}",
        lost,
        f"{point.flops / 1e6:.0f}",
        f"{point.flops_ratio:.3f}",
        f"{point.first_ms:.2f} ms",
        f"{point.first_ratio:.3f}",
        f"{point.step_ms:.2f} ms",
        f"{point.step_ratio:.3f}",
        f"{point.peak_bytes / 2**20:.0f} MiB",
    )


def share_of(point: Point) -> str:
    """What was asked."""
    if point.asked is not None:
        return f"{point.asked:.4g}" if point.asked > 1 else f"{100 * point.asked:.4g} %"
    return "all" if point.phase == "none" else "own"


def _refusals(report: Report) -> str:
    """Reasons, each with its methods and shares."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in report.refusals:
        share = "" if one.asked is None else f"{100 * one.asked:.4g} %"
        found.setdefault((one.method, one.reason), []).append(share)
    return "\n".join(
        f"- {method}{': ' * any(shares)}{', '.join(filter(None, shares))}: {reason}"
        for (method, reason), shares in found.items()
    )
