"""Seconds of `vtr inspect` on a 7B graph, and of cut insertion into 80 layers after load.

python samples/bench/analysis_cost.py
python samples/bench/analysis_cost.py --traced    also the decoder that an export of 7 B writes

Graphs come from the builder of the tests' random decoders, at real depth; their weights are
external and absent. Inspection is a whole process, imports included (bar: 3 s); insertion is
`InsertCuts` and the two passes behind it, in a process that has loaded the graph (2 s). Both run in
one thread: the bars are on seconds of a core, which other load on the machine does not change.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from measure import (
    HERE,
    MIB,
    Usage,
    checkpoint,
    export,
    head,
    in_turns,
    parser,
    python,
    table,
    verdict,
    vtr,
    work,
)

sys.path.insert(0, str(HERE.parents[1] / "tests"))
INSPECT_BAR, INSERT_BAR = 3.0, 2.0  # seconds
FORMS = ("outside", "inside", "grouped", "multi_head", "added")
ARRANGED = {"qkv": "split", "mlp": "gated", "norm": "rms_parts", "rope_form": "parts", "fp16": True}
SHAPES: dict[str, dict[str, int]] = {
    "7b": {"layers": 32, "width": 4096, "kv_heads": 32, "group": 1},
    "70b": {"layers": 80, "width": 8192, "kv_heads": 8, "group": 8},
    "tiny": {"layers": 4, "width": 32, "kv_heads": 2, "group": 2},
}
CUTS = {"1 cut": (2,), "3 cuts": (20, 40, 60), "a cut before each layer": tuple(range(1, 80))}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--traced", action="store_true", help="and a graph that vtr export wrote")
    options.add_argument("--insert", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--write", nargs=3, help=argparse.SUPPRESS)  # form, shape, file
    options.set_defaults(runs=3)
    args = options.parse_args()
    if args.insert is not None:
        print(json.dumps(_insert(args.insert)))
        return
    if args.write is not None:
        _write(*args.write)
        return
    with work(args.work) as folder:
        shapes = ("tiny", "tiny") if args.tiny else ("7b", "70b")
        files = {form: _written(form, shapes[0], folder) for form in FORMS}
        deep = _written("outside", shapes[1], folder)
        if args.traced:
            files["traced by vtr export"] = _traced(folder)
        print(head(f"{args.runs} rounds in turns"))
        met = _inspected(files, args.runs) & _inserted(deep, args.runs)
    sys.exit(0 if met or args.tiny else 1)


def _written(form: str, shape: str, folder: Path) -> Path:
    """A graph without its weights, made in a process of its own."""
    file = folder / f"{shape}-{form}.onnx"
    python("analysis_cost.py", "--write", form, shape, file)
    return file


def _write(form: str, shape: str, file: str) -> None:
    import onnx_ir as ir
    from foreign_decoders import foreign
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, ShapeInferencePass
    from random_decoders import Decoder

    sizes: dict[str, Any] = {**SHAPES[shape], **ARRANGED}
    model = foreign(Decoder(**sizes, head_width=128, value_width=128), Absent(), form)
    if form == "outside":  # as our frontend gives it
        CommonSubexpressionEliminationPass()(model)
        ShapeInferencePass()(model)
    ir.save(model, file)


class Absent:
    """Weights that are only said to lie in a file."""

    def __init__(self) -> None:
        self.offset = 0

    def __call__(  # noqa: D102 - see decoder_writer.Weights
        self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]
    ) -> Any:
        import onnx_ir as ir

        shape = (*shapes[0][:-1], sum(each[-1] for each in shapes))
        count = 2
        for size in shape:
            count *= size
        tensor = ir.ExternalTensor(
            "absent.bin",
            self.offset,
            count,
            ir.DataType.FLOAT16,
            shape=ir.Shape(shape),
            name=names[0],
        )
        self.offset += count
        return tensor


def _traced(folder: Path) -> Path:
    schedule = folder / "schedule.yaml"
    schedule.write_text("version: 1\nprefill: {stages: []}\n")
    model = checkpoint("llava-7b", folder, "fp16", sparse=True)
    export(model, folder / "traced", schedule, dtype="fp16", weights="link")
    return next((folder / "traced").rglob("*decoder*.onnx"))


def _inspected(files: dict[str, Path], runs: int) -> bool:
    sides: dict[str, Callable[[], Usage]] = {
        name: lambda file=file: vtr("inspect", file, "--json")  # type: ignore[misc]
        for name, file in files.items()
    }
    rows: list[Sequence[object]] = [
        ("attention", "nodes", "layers", "s", "of a core", "peak", f"bar {INSPECT_BAR:g} s")
    ]
    all_met = True
    for name, found in in_turns(sides, runs).items():
        seconds, busy = (
            median(getattr(each, name) for each in found) for name in ("seconds", "cpu_seconds")
        )
        report, is_met = found[0].report, busy <= INSPECT_BAR
        all_met &= is_met
        peak = f"{median(each.peak_bytes for each in found) / MIB:.0f} MiB"
        nodes, layers = report["graphs"][0]["nodes"], len(report["layers"])
        rows.append((name, nodes, layers, f"{seconds:.2f}", f"{busy:.2f}", peak, verdict(is_met)))
    print(table(rows) + "\n")
    return all_met


def _inserted(file: Path, runs: int) -> bool:
    found = in_turns({"": lambda: python("analysis_cost.py", "--insert", file)}, runs)[""]
    rows: list[Sequence[object]] = [
        ("80 layers", "nodes", "s", "of a core", f"bar {INSERT_BAR:g} s")
    ]
    all_met = True
    for name in found[0].report:
        each = [usage.report[name] for usage in found]
        seconds, busy = (median(one[kind] for one in each) for kind in ("seconds", "cpu_seconds"))
        is_met = busy <= INSERT_BAR
        all_met &= is_met
        rows.append((name, each[0]["nodes"], f"{seconds:.2f}", f"{busy:.2f}", verdict(is_met)))
    print(table(rows))
    return all_met


def _insert(file: Path) -> dict[str, Any]:
    """Seconds after load, for each list of cuts and both sources of scores."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

    from vtr_export.passes.insert_cuts import InsertCuts
    from vtr_export.schedule import Cut, Keep, Resolved

    reported = {}
    for name, layers in CUTS.items():
        for source in ("previous", "next"):
            model = ir.load(file)
            depth = sum(node.op_type == "Attention" for node in model.graph)
            cuts = [Cut(n, Keep(depth - n, depth)) for n in layers if n < depth]
            schedule = Resolved(depth, None, tuple(cuts), source=source)
            start, busy = time.perf_counter(), time.process_time()
            for step in (InsertCuts(schedule), RemoveUnusedNodesPass(), TopologicalSortPass()):
                step(model)
            reported[f"{name}, scored by the {source} layer"] = {
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - busy,
                "nodes": len(model.graph),
            }
    return reported


if __name__ == "__main__":
    main()
