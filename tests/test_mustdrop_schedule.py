"""MustDrop as a schedule: what is published, and what its words are refused with."""

import re
from pathlib import Path

import pytest

from vtr_export.errors import ScheduleError
from vtr_export.families import read_facts
from vtr_export.schedule import Schedule
from vtr_export.schedule_document import Threshold

LLAVA = read_facts({"model_type": "llava"}, "config.json")  # of 32 layers, 576 tokens
SAMPLES = Path(__file__).parents[1] / "samples" / "schedules"


def test_mustdrop_has_thresholds_for_layers_and_a_word_for_each_phase() -> None:
    for tokens in (192, 128, 64):
        sample = SAMPLES / f"mustdrop_{tokens}.yaml"
        assert Schedule.load(sample) == (made := Schedule.mustdrop(tokens))
        assert Schedule.parse(made.dump()) == made
    fixed = Schedule.mustdrop(64, windows=40)
    resolved = fixed.resolve(LLAVA)
    assert [cut.before_layer for cut in resolved.cuts] == [3, 7, 11, 15]
    assert resolved.keep_per_layer(576 - 8 * 40) == (256,) * 32  # at most
    assert Schedule.mustdrop(64).resolve(LLAVA).tokens_per_image is None
    assert (resolved.threshold, resolved.protect) == (Threshold(whole=0.011, single=0.01), True)


THRESHOLD = "threshold: {whole: 0.1, single: 0.1}"


@pytest.mark.parametrize(
    ("vision", "prefill", "where", "reason"),
    [
        ("", "protect: keys, stages: []", "protect", "no vision reduction"),
        ("fastervlm, keep: 9", "protect: keys, stages: []", "protect", "no vision reduction"),
        ("mustdrop", f"{THRESHOLD}, rank: per_image, stages: []", "rank", "fixed number"),
        ("", f"{THRESHOLD}, rank: per_image, stages: []", "rank", "threshold"),
        ("", f"{THRESHOLD}, keep: [{', '.join(['100%'] * 32)}]", "keep", "stages"),
        ("mustdrop", "protect: keys, stages: [{before_layer: 3, keep: 8%}]", "keep", "protected"),
        (
            "mustdrop, windows: 8}, {method: divprune, keep: 40",
            "protect: keys, stages: [{before_layer: 3, keep: 30}]",
            "keep",
            "30 of 40 tokens, and 40 are protected",
        ),
    ],
)
def test_what_protects_and_filters_must_be_there(
    vision: str, prefill: str, where: str, reason: str
) -> None:
    entries = f"{{method: {vision}}}" if vision else ""
    schedule = Schedule.parse(f"version: 1\nvision: [{entries}]\nprefill: {{{prefill}}}")
    with pytest.raises(ScheduleError, match=re.escape(reason)) as caught:
        schedule.resolve(LLAVA)
    assert where in caught.value.where
    assert caught.value.hint
