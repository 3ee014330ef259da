"""The README's support table, from the code and from what was recorded.

python samples/support/table.py writes it into README.md (or the page that is given).
"""

import json
import sys
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vtr_export.families import DECODERS, FAMILIES, TOWERS
from vtr_export.frontends.transformers import IR_DTYPES

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- python samples/support/table.py -->\n", "<!-- end -->"
HEAD = (
    "family",
    "checkpoint class",
    "exports to",
    "ONNX Runtime CPU",
    "ONNX Runtime CUDA",
    "TensorRT-RTX build",
    "executed on",
)
NEVER = "not run yet"
Record = dict[str, Any]


def records() -> list[Record]:
    """What ``record.py`` wrote, one file a machine."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.json"))]


def table(found: list[Record]) -> str:
    """Markdown: one row a family."""
    rows = [HEAD, ("---",) * len(HEAD), *(_row(family, found) for family in FAMILIES)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(family: str, found: list[Record]) -> tuple[str, ...]:
    own = [record for record in found if record["family"] == family]
    built = [record["built"] for record in own if record["built"]]
    return (
        family,
        f"`{MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family]}`: {_parts()}",
        ", ".join(IR_DTYPES),
        _dtypes(own, "cpu"),
        _dtypes(own, "cuda"),
        "; ".join(dict.fromkeys(_build(each) for each in built)) or NEVER,
        "; ".join(_executed(record) for record in own) or NEVER,
    )


def _parts() -> str:
    towers = ", ".join(name.removesuffix("_vision_model") for name in TOWERS)
    return f"{towers} + {', '.join(DECODERS)}"


def _dtypes(own: list[Record], device: str) -> str:
    ran = dict.fromkeys(d for r in own if r["device"] == device for d in r["executed"])
    return ", ".join(ran) or NEVER


def _build(built: Record) -> str:
    return f"{', '.join(built['dtypes'])} ({built['builder']})"


def _executed(record: Record) -> str:
    counts = [
        f"{dtype} {count['right']} of {count['questions']} right"
        for dtype, count in record["executed"].items()
    ]
    return f"{record['machine']}, {record['runtime']}, {record['date']}: {', '.join(counts)}"


def put(text: str, into: str) -> str:
    """``into`` with the text between the two marks replaced."""
    before, begin, rest = into.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md has lost {(begin and END) or BEGIN!r}")
    return before + begin + text + end + after


if __name__ == "__main__":
    page = Path(sys.argv[1]) if sys.argv[1:] else README
    text = put(table(records()), page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")
