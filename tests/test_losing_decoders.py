"""What cannot be narrowed is refused with a place and a way out, and stays as it was."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from losing_decoders import KINDS, losing
from random_decoders import Decoder, Random, build
from test_random_decoders import case

from vtr_export.errors import AnalysisError
from vtr_export.passes.insert_cuts import InsertCuts
from vtr_export.schedule import Cut, Keep, Resolved

SEEDS = 4
UNPACKED: dict[str, dict[str, Any]] = {
    "several components": {"positions": "mrope_late"},
    "tables given": {"tables": "given"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_stream_is_refused(kind: str) -> None:
    for seed in range(SEEDS):
        it = case(seed)
        last = max(item.before_layer for item in it.schedule.cuts)
        at = int(np.random.default_rng(seed).integers(last, it.decoder.layers))
        model = losing(it.decoder, seed, kind, at)
        was = ir.to_onnx_text(model)
        with pytest.raises(AnalysisError) as caught:
            InsertCuts(it.schedule, tunable=it.tunable)(model)
        assert caught.value.hint
        assert ir.to_onnx_text(model) == was


@pytest.mark.parametrize("why", UNPACKED)
def test_positions_that_cannot_be_repacked_are_refused(why: str) -> None:
    decoder = Decoder(rope="halves", rope_form="parts", **UNPACKED[why])
    model = build(decoder, Random(1))
    schedule = Resolved(2, None, (Cut(1, Keep(1, 2)),), positions="repacked")
    with pytest.raises(AnalysisError, match="repacked") as caught:
        InsertCuts(schedule)(model)
    assert "original" in caught.value.hint
