"""The report behind ``vtr plan``."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from test_families import LLAVA_7B, tiny

from vtr_export.errors import InputError, ScheduleError
from vtr_export.families import read_facts
from vtr_export.plan import PlanReport, plan
from vtr_export.schedule import Schedule

LLAVA = read_facts(LLAVA_7B, "config.json")
TINY = read_facts(tiny(), "config.json")
DYNAMIC = replace(TINY, tokens_per_image=None)


def test_the_golden_facts() -> None:
    report = plan(Schedule.pyramid(0.5), LLAVA, convention="F-A", text_tokens=0).to_json()
    assert report["total"] == pytest.approx(1.777e12, rel=0.0005)
    assert report["unpruned"] == pytest.approx(3.817e12, rel=0.0005)
    assert report["ratio"] == pytest.approx(1.777 / 3.817, abs=0.0005)
    assert report["vision_tokens_per_layer"] == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert (report["convention"], report["unit"]) == ("F-A", "multiply-adds, published as FLOPs")


def test_the_report_is_plain_json() -> None:
    report = plan(Schedule.fastv(), LLAVA, device="orin-nx", memory="8GiB")
    assert json.loads(json.dumps(report.to_json())) == report.to_json()


def test_images_multiply_tokens_and_time() -> None:
    one, two = (plan(Schedule.fastv(1), TINY, images=n, device="cpu") for n in (1, 2))
    assert one.vision_tokens_per_layer == (4, 2, 2)
    assert two.vision_tokens_per_layer == (8, 4, 4)
    assert two.vision_flops == 2 * one.vision_flops
    assert plan(Schedule.fastv(1), TINY, images=0).ratio == 1.0


def test_batch_multiplies_the_cache_but_not_the_cost_of_a_prompt() -> None:
    one, four = (plan(Schedule.fastv(1), TINY, batch=n) for n in (1, 4))
    assert four.kv_bytes == 4 * one.kv_bytes
    assert four.total == one.total


@pytest.mark.parametrize(("weights", "fits"), [("fp16", False), ("int8", True), ("int4", True)])
def test_memory_fits_or_not(weights: str, fits: bool) -> None:
    report = plan(Schedule.fastv(), LLAVA, weights=weights, memory="8GiB", device="orin-nx")
    assert report.fits is fits
    assert report.dominant == "weights"
    assert ("fits 8 GiB", "yes" if fits else "no", "yes" if fits else "no") in report.rows()


def test_a_schedule_can_make_it_fit() -> None:
    options: dict[str, Any] = {
        "weights": "int4",
        "images": 5,
        "batch": 8,
        "new_tokens": 512,
        "device": "orin-nx",
    }
    report = plan(Schedule.vtw(4), LLAVA, memory="16GiB", **options)
    assert (report.fits, report.fits_unpruned) == (True, False)
    assert plan(Schedule.vtw(4), LLAVA, memory=report.peak_bytes, **options).fits is True
    assert plan(Schedule.vtw(4), LLAVA, memory=report.peak_bytes - 1, **options).fits is False


def test_pruning_helps_the_first_token_most() -> None:
    for device in ("orin-nx", "agx-orin", "rtx-4090", "h100", "cpu"):
        report = plan(Schedule.fastv(), LLAVA, device=device)
        assert None not in (report.ttft_ms, report.tpot_ms)
        assert report.ttft_ms < report.ttft_ms_unpruned  # type: ignore[operator]
        assert report.tpot_ms < report.tpot_ms_unpruned  # type: ignore[operator]
    weights = [
        plan(Schedule.fastv(), LLAVA, device="orin-nx", weights=w).tpot_ms
        for w in ("fp32", "fp16", "int8", "int4")
    ]
    assert weights == sorted(weights, reverse=True)  # type: ignore[type-var]


def test_rows_are_label_unpruned_pruned() -> None:
    short, long = (
        plan(Schedule.fastv(), LLAVA),
        plan(Schedule.fastv(), LLAVA, device="h100", memory="80GB"),
    )
    assert len(short.rows()) == 7
    assert [row[0] for row in long.rows()[7:]] == [
        "fits 74.51 GiB",
        "first token, h100",
        "each next token, h100",
    ]
    assert [row[0] for row in short.rows()[1:4]] == [
        "prefill, F-A",
        "decode of 128, F-A",
        "prefill and decode, F-A",
    ]
    assert len(plan(Schedule.fastv(), LLAVA, new_tokens=0).rows()) == 5


def test_an_answer_is_prefill_and_decode() -> None:
    report = plan(Schedule.fastv(), LLAVA, new_tokens=128).to_json()
    answer, whole = (
        report["total"] + report["decode"],
        report["unpruned"] + report["decode_unpruned"],
    )
    assert report["answer_ratio"] == answer / whole
    assert report["ratio"] < report["answer_ratio"] < 1  # the prompt gains most
    shown = {what: values for what, *values in plan(Schedule.fastv(), LLAVA).rows()}
    assert shown["prefill and decode, F-A"] == [f"{whole:.4g}", f"{answer:.4g}"]
    silent = plan(Schedule.fastv(), LLAVA, new_tokens=0)
    assert (silent.decode, silent.answer_ratio) == (0, silent.ratio)


def test_a_prompt_beyond_the_context_is_noted() -> None:
    assert plan(Schedule.fastv(1), TINY, text_tokens=40, new_tokens=20).notes == ()
    assert "64" in plan(Schedule.fastv(1), TINY, text_tokens=40, new_tokens=21).notes[0]


def test_a_model_of_varying_tokens_needs_their_number() -> None:
    with pytest.raises(InputError, match="vary"):
        plan(Schedule.fastv(1), DYNAMIC)
    assert plan(Schedule.fastv(1), DYNAMIC, vision_tokens=7).vision_tokens_per_layer == (7, 3, 3)


def test_tensorrt_selects_at_most_3840() -> None:
    schedule = Schedule.parse(
        "version: 1\nprefill:\n  stages:\n  - {before_layer: 2, keep: 50%}\n", "s.yaml"
    )
    without: dict[str, Any] = {"target": "tensorrt", "plugin": "off"}
    assert plan(schedule, LLAVA, images=13, **without).vision_tokens_per_layer[2] == 3744
    assert plan(schedule, LLAVA, images=14).vision_tokens_per_layer[2] == 4032
    with pytest.raises(ScheduleError, match=r"4032.*3840") as caught:
        plan(schedule, LLAVA, images=14, **without)
    assert caught.value.where == "s.yaml:4: prefill.stages[0].keep"
    assert caught.value.hint
    plan(schedule, replace(LLAVA, tokens_per_image=7680), **without)
    each = Schedule.from_keeps([576, *[288] * 31], rank="per_image")
    plan(each, LLAVA, images=14, **without)
    with pytest.raises(ScheduleError) as caught:
        plan(
            Schedule.from_keeps([5000, *[4000] * 31]),
            replace(LLAVA, tokens_per_image=5000),
            **without,
        )
    assert caught.value.where.endswith("prefill.keep[1]")


@pytest.mark.parametrize(
    "options",
    [
        {"convention": "F"},
        {"device": "tpu"},
        {"weights": "fp6"},
        {"dtype": "fp24"},
        {"memory": "much"},
        {"target": "coreml"},
        {"batch": 0},
        {"images": -1},
        {"text_tokens": True},
        {"new_tokens": -1},
        {"vision_tokens": -1},
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        plan(Schedule.fastv(1), TINY, **options)
    assert caught.value.hint


def test_a_schedule_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ScheduleError, match="the model has 3"):
        plan(Schedule.pyramid(), TINY)


def test_planning_needs_no_heavy_wheels() -> None:
    heavy = ("torch", "onnx", "onnx_ir", "onnxruntime", "transformers", "numpy", "rich")
    probe = f"import sys, vtr_export.plan; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_report_is_frozen() -> None:
    report: PlanReport = plan(Schedule.fastv(1), TINY)
    with pytest.raises(AttributeError):
        report.total = 0  # type: ignore[misc]
