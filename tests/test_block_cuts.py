"""Cuts that look at all vision rows: exported and verified, counted, refused."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from test_cost import TINY

from vtr_export.cost import cut_flops, layer_rows
from vtr_export.errors import ScheduleError
from vtr_export.exporter import export
from vtr_export.manifest import Manifest
from vtr_export.memory import Workload, get_weight_type, peak_bytes
from vtr_export.schedule import Schedule

MERGED: dict[str, Any] = {
    "score": {"rule": "redundancy", "query": "text"},
    "drop_point": "attended",
    "merge": {"by": "correlate"},
}
FITPRUNE: dict[str, Any] = {
    "score": {"rule": "self_cross", "query": "text", "heads": "max"},
    "drop_point": "inside",
}


@pytest.mark.parametrize(
    ("options", "operator"), [(MERGED, "VtrCorrelatePrune"), (FITPRUNE, "VtrScoredPrune")]
)
def test_an_export_passes_every_gate_forced_and_free(
    options: dict[str, Any],
    operator: str,
    checkpoint: Path,
    checked_here: None,
    shared_traces: None,
    tmp_path: Path,
) -> None:
    """Forced keep-sets are merged as the cut would have merged them."""
    schedule = Schedule.from_keeps([16, 10, 5], **options)
    done = export(schedule, checkpoint, tmp_path / "out", verify="all")
    kinds = {gate.name.partition(".")[0] for gate in done.gates if gate.passed}
    assert {"forced", "keep_sets", "scores"} <= kinds
    assert done.verified
    graph = ir.load(tmp_path / "out" / Manifest.load(tmp_path / "out").graphs.decoder).graph
    assert [node.op_type for node in graph if node.op_type.endswith("Prune")] == [operator] * 2


def test_what_all_vision_rows_ask_and_what_a_merge_multiplies_is_counted() -> None:
    """4 vision and 6 text tokens, heads of width 16 together, hidden width 16: by hand."""
    few, all_rows, merged = (
        Schedule.from_keeps([4, 2, 2], **options).resolve(TINY)
        for options in ({"score": {"query": "text"}}, FITPRUNE, MERGED)
    )
    width = TINY.heads * TINY.head_dim
    assert cut_flops(TINY, few, 4, 6) == (2 * 6 * 10 * width,)
    assert cut_flops(TINY, all_rows, 4, 6) == (2 * (6 + 4) * 10 * width,)
    extra = 2 * 4 * 4 * 6 + 2 * 4 * 4 * TINY.hidden
    assert cut_flops(TINY, merged, 4, 6) == (2 * (6 + 4) * 10 * width + extra,)
    assert cut_flops(TINY, merged, 0, 6) == (0,)
    first = layer_rows(merged, 4, 6)[0]
    assert (first.entering, first.mixed, first.leaving) == (10, 10, 8)
    first = layer_rows(all_rows, 4, 6)[0]
    assert (first.entering, first.mixed, first.leaving) == (10, 8, 8)


def test_a_plan_counts_what_all_vision_rows_hold_at_once() -> None:
    work, kind = Workload(4, 6), get_weight_type("fp16")
    few, all_rows = (
        peak_bytes(
            TINY, Schedule.from_keeps([4, 2, 2], **options).resolve(TINY), work, kind, fused=True
        )
        for options in ({"drop_point": "inside"}, FITPRUNE)
    )
    assert all_rows.prefill - few.prefill == 2 * 4 * TINY.heads * 10 * 10  # fp32, twice


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (FITPRUNE | {"score": {"rule": "self_cross", "from": "next"}}, "from"),
        (MERGED | {"drop_point": "inside"}, "drop_point"),
        (MERGED | {"threshold": {"whole": 0.1, "single": 0.1}}, "threshold"),
        (FITPRUNE | {"merge": {"by": "recycle"}}, "merge"),
        (FITPRUNE | {"score": {"rule": "redundancy", "query": "raters"}}, "query"),
    ],
)
def test_what_is_not_defined_together_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason) as caught:
        Schedule.from_keeps([4, 2, 2], **options).resolve(TINY)
    assert caught.value.where
    assert caught.value.hint
