"""The README's support tables, from the code and from what was recorded.

python samples/support/table.py writes them into README.md (or the page that is given).
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vtr_export.families import DECODERS, TOWERS
from vtr_export.frontends.transformers import IR_DTYPES

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- python samples/support/table.py -->\n", "<!-- end -->"
BEGIN_FAMILIES = "<!-- python samples/bench/families.py -->\n"
RECORDED = HERE.parent / "bench" / "families.json"
BEGIN_METHODS = "<!-- python samples/bench/methods.py -->\n"
METHODS = HERE.parent / "bench" / "methods.json"
METHOD_HEAD = ("tokens", "where they go", "most accurate", "accuracy", "FLOPs", "first token",
               "next token")  # fmt: skip
PHASES = {"vision": "before the decoder", "prefill": "inside it", "both": "both"}
FAMILY_HEAD = ("family", "checkpoint class", "gates passed", "seconds", "peak MiB")
HEAD = (
    "family",
    "checkpoint class",
    "exports to",
    "ONNX Runtime CPU",
    "ONNX Runtime CUDA",
    "TensorRT builds",
    "TensorRT runs",
    "executed on",
)
BUILDERS = {"tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
NEVER = "not run yet"
Record = dict[str, Any]


def records() -> list[Record]:
    """What ``samples/acceptance.py --record`` wrote, one file a machine and target."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.json"))]


def table(found: list[Record]) -> str:
    """Markdown: one row a family."""
    recorded = dict.fromkeys(record["family"] for record in found)
    return _markdown([HEAD, *(_row(family, found) for family in recorded)])


def families(recorded: Record) -> str:
    """Markdown: one row a tiny checkpoint that was exported and verified."""
    rows = [
        (
            name,
            f"`{one['class']}`",
            f"{one['passed']} of {one['gates']}",
            f"{one['export_seconds']:g}",
            str(one["peak_mib"]),
        )
        for name, one in sorted(recorded["families"].items())
    ]
    return _markdown([FAMILY_HEAD, *rows])


def methods(report: Record) -> str:
    """Markdown: at each share, the most accurate method of each kind, beside the unpruned model.

    Of equally accurate ones that of fewer FLOPs.
    """
    whole, *points = report["points"]
    shares = sorted({one["asked"] for one in points if one["asked"]}, reverse=True)
    rows = [("all", "", "unpruned", f"{whole['accuracy']:.1%}", "1", "1", "1")]
    for share in shares:
        for phase, where in PHASES.items():
            own = [one for one in points if (one["asked"], one["phase"]) == (share, phase)]
            if own:
                best = max(own, key=lambda one: (one["accuracy"], -one["flops"]))
                rows.append(_method(best, where))
    return _markdown([METHOD_HEAD, *rows])


def _method(one: Record, where: str) -> tuple[str, ...]:
    ratios = (f"{one[name]:.2f}" for name in ("flops_ratio", "first_ratio", "step_ratio"))
    return (f"{100 * one['asked']:g} %", where, one["method"], f"{one['accuracy']:.1%}", *ratios)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ("---",) * len(head), *rest))


def _row(family: str, found: list[Record]) -> tuple[str, ...]:
    own = [record for record in found if record["family"] == family]
    ran = [record for record in own if executed(record)]
    builds = [said for record in own if (said := _builds(record))]
    return (
        family,
        f"`{MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family]}`: {_parts()}",
        ", ".join(IR_DTYPES),
        _dtypes(ran, "cpu", ("onnxruntime",)),
        _dtypes(ran, "cuda", ("onnxruntime",)),
        "; ".join(dict.fromkeys(builds)) or NEVER,
        _dtypes(ran, "cuda", tuple(BUILDERS)),
        "; ".join(map(_executed, ran)) or NEVER,
    )


def executed(record: Record) -> dict[str, Record]:
    """By dtype, the answers of the runs that were executed and passed."""
    return {
        dtype: run["answers"]
        for dtype, run in record["runs"].items()
        if run["answers"] and run["answers"]["passed"] and run["verify"]["passed"]
    }


def _parts() -> str:
    towers = ", ".join(name.removesuffix("_vision_model") for name in TOWERS)
    return f"{towers} + {', '.join(DECODERS)}"


def _dtypes(ran: list[Record], device: str, targets: tuple[str, ...]) -> str:
    own = (r for r in ran if r["device"] == device and r["target"] in targets)
    return ", ".join(dict.fromkeys(d for r in own for d in executed(r))) or NEVER


def _builds(record: Record) -> str:
    """``fp16 for SM 8.6, 8.9 (TensorRT-RTX 1.7)``; empty where nothing was built."""
    built = {d: run["build"] for d, run in record["runs"].items() if run["build"]}
    if not built:
        return ""
    first = next(iter(built.values()))
    sms = ", ".join(f"{sm // 10}.{sm % 10}" for sm in first["sms"])
    return f"{', '.join(built)} for SM {sms} ({BUILDERS[first['target']]} {first['tensorrt']})"


def _executed(record: Record) -> str:
    counts = [
        f"{dtype} {found['right']} of {found['with_known_answer']} right, "
        f"{found['alike']} as transformers"
        for dtype, found in executed(record).items()
    ]
    return f"{record['machine']}, {record['runtime']}, {record['date']}: {'; '.join(counts)}"


def put(text: str, mark: str, into: str) -> str:
    """``into`` with the text behind the mark replaced."""
    before, begin, rest = into.partition(mark)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md has lost {(begin and END) or mark!r}")
    return before + begin + text + end + after


if __name__ == "__main__":
    page = Path(sys.argv[1]) if sys.argv[1:] else README
    text = put(table(records()), BEGIN, page.read_text(encoding="utf-8"))
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    text = put(families(recorded), BEGIN_FAMILIES, text)
    compared = json.loads(METHODS.read_text(encoding="utf-8"))
    page.write_text(put(methods(compared), BEGIN_METHODS, text), encoding="utf-8")
