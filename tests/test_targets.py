"""What each target serves: names of SMs, types an SM has, and what is refused before any work."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from command import vtr
from test_families import LLAVA_7B, tiny

from vtr_export.errors import InputError, ScheduleError
from vtr_export.families import read_facts
from vtr_export.plan import plan
from vtr_export.schedule import Cut, Keep, Resolved, Schedule
from vtr_export.target_fit import check_fits_target
from vtr_export.targets import (
    RTX_SMS,
    SMS,
    TARGETS,
    check_target,
    parse_sm,
    parse_sms,
)

LLAVA = read_facts(LLAVA_7B, "config.json")
TEXT_ROWS = """version: 1
prefill:
  score: {query: text}
  stages: [{before_layer: 2, keep: 50%}]
"""
WHEEL = "tensorrt_rtx_bindings"


def refused(target: str, sms: tuple[int, ...], dtype: str) -> str:
    with pytest.raises(InputError) as caught:
        check_target(target, sms, dtype)
    assert caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("text", ["86", "8.6", "sm_86", "sm86", "SM_86", "SM 8.6", " 86 "])
def test_an_sm_has_many_spellings(text: str) -> None:
    assert parse_sm(text) == 86


@pytest.mark.parametrize(
    "text", ["", "8", "86.0", "8.60", "sm_90a", "ada", "-86", "0", "1.2.0", "99"]
)
def test_what_names_no_sm_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no SM") as caught:
        parse_sm(text)
    assert "120" in caught.value.hint


def test_a_list_of_sms_is_ascending_and_says_each_once() -> None:
    assert parse_sms("120, 8.6,sm_89,86") == (86, 89, 120)
    assert parse_sms("10.3,103,12.1") == (103, 121)
    for nothing in ("", " , "):
        with pytest.raises(InputError, match="no SM"):
            parse_sms(nothing)
    with pytest.raises(InputError, match="'7'"):
        parse_sms("86,7")


@pytest.mark.skipif(
    importlib.util.find_spec(WHEEL) is None,
    reason=f"{WHEEL} is not installed: pip install 'vtr-export[rtx]' (x86-64 Linux)",
)
def test_tensorrt_rtx_serves_what_its_library_names() -> None:
    import tensorrt_rtx_bindings.tensorrt_rtx as trt

    names = {name for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert names == {f"SM{number}" for number in RTX_SMS}


@pytest.mark.parametrize("number", sorted(set(SMS) - set(RTX_SMS)))
def test_what_rtx_does_not_serve_is_built_on_the_device(number: int) -> None:
    said = refused("tensorrt-rtx", (86, number), "fp16")
    assert f"SM {number / 10}" in said
    assert "--target tensorrt on the device" in said
    check_target("tensorrt", (number,), "fp16")


@pytest.mark.parametrize(
    ("dtype", "last_without", "first_with"),
    [("bf16", 75, 80), ("int8", 75, 80), ("int4", 75, 80), ("fp8", 87, 89), ("fp4", 90, 100)],
)
def test_a_type_begins_with_an_sm(dtype: str, last_without: int, first_with: int) -> None:
    assert dtype in refused("tensorrt", (last_without, 120), dtype)
    check_target("tensorrt", (first_with, 120), dtype)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_a_decoder_in_fp32_is_refused(target: str) -> None:
    assert "--dtype fp16 or bf16" in refused(target, (), "fp32")
    assert "--dtype fp16 or bf16" in refused(target, (86,), "fp32")
    check_target("tensorrt-10", (87,), "fp32")


def test_targets_and_types_that_are_none() -> None:
    assert ", ".join(TARGETS) in refused("abacus", (), "fp16")
    assert "fp16" in refused("tensorrt", (), "fp24")
    assert "no SM 70" in refused("tensorrt", (70,), "fp16")
    assert "--sm" in refused("onnxruntime", (86,), "fp32")
    check_target("onnxruntime", (), "fp32")


def test_the_plugin_lifts_the_limit_of_topk() -> None:
    schedule = Schedule.fastv(2, "50%")
    for target in ("tensorrt", "tensorrt-rtx"):
        done = plan(schedule, LLAVA, images=14, target=target, plugin="auto")
        assert [("4032" in limit, "plugin" in limit) for limit in done.limits] == [(True, True)]
        with pytest.raises(ScheduleError, match=r"4032.*3840") as caught:
            plan(schedule, LLAVA, images=14, target=target, plugin="off")
        assert "--plugin auto" in caught.value.hint
    assert plan(schedule, LLAVA, images=13, target="tensorrt-rtx").limits == ()
    with pytest.raises(ScheduleError, match=r"4032.*3840") as caught:
        plan(schedule, LLAVA, images=14, target="tensorrt-10")
    assert "plugin" not in caught.value.hint


def test_a_cut_that_keeps_all_is_left_out_of_an_engine() -> None:
    facts = replace(LLAVA, tokens_per_image=5000)
    stages = "{before_layer: 2, keep: 100%}, {before_layer: 3, keep: 10}"
    schedule = Schedule.parse(f"version: 1\nprefill: {{stages: [{stages}]}}\n")
    assert [cut.keep.of(5000) for cut in schedule.resolve(facts).cuts] == [5000, 10]
    assert plan(schedule, facts, target="tensorrt-rtx", plugin="off").limits == ()
    with pytest.raises(ScheduleError, match="5000"):
        plan(schedule, facts, target="tensorrt-10")


def test_turing_needs_the_plugin_for_a_cut() -> None:
    schedule, uncut = Schedule.fastv(1), Schedule.unpruned()
    facts = read_facts(tiny(), "config.json")
    assert "7.5" in plan(schedule, facts, target="tensorrt-rtx", sms=(75, 86)).limits[0]
    with pytest.raises(ScheduleError, match=r"7\.5"):
        plan(schedule, facts, target="tensorrt-rtx", sms=(75, 86), plugin="off")
    for other in ({"sms": (80, 86)}, {"sms": (75,), "target": "tensorrt"}):
        options: dict[str, Any] = {"target": "tensorrt-rtx", "plugin": "off", **other}
        assert plan(schedule, facts, **options).limits == ()
    assert plan(uncut, facts, target="tensorrt-rtx", sms=(75,), plugin="off").limits == ()


def test_the_plugin_serves_whatever_a_schedule_says() -> None:
    from vtr_export.backends.tensorrt.python_plugin import SERVED  # brings onnx_ir

    said = get_type_hints(Resolved)
    left = {name: {*get_args(said[name])} - {*served} for name, served in SERVED.items()}
    assert left == {"query": {"raters"}, "heads": set(), "rank": set()}
    raters = Resolved(32, 576, (Cut(2, Keep(288, 576)),), query="raters")
    with pytest.raises(InputError, match="plugin"):
        check_fits_target(Schedule.fastv(), raters, 576, "tensorrt-rtx", plugin="on")
    with pytest.raises(ScheduleError, match=r"7\.5"):  # which the plugin helps with elsewhere
        check_fits_target(Schedule.fastv(), raters, 576, "tensorrt-rtx", sms=(75,), plugin="auto")
    text = Schedule.parse(TEXT_ROWS)
    for choice in ("on", "auto"):
        long = plan(text, LLAVA, images=14, target="tensorrt-rtx", plugin=choice)
        assert "4032" in long.limits[0]
    with pytest.raises(ScheduleError, match="4032") as caught:
        plan(text, LLAVA, images=14, target="tensorrt-rtx", plugin="off")
    assert "--plugin auto" in caught.value.hint
    uncut = Schedule.unpruned()
    assert plan(uncut, LLAVA, target="tensorrt-rtx", plugin="on").limits == ()


def test_narrow_heads_are_not_fused_and_hold_scores() -> None:
    facts = read_facts(tiny(), "config.json")
    long: dict[str, Any] = {"target": "tensorrt-rtx", "text_tokens": 4000, "new_tokens": 0}
    wide, narrow = (
        plan(Schedule.unpruned(), replace(facts, head_dim=width), **long) for width in (16, 8)
    )
    assert not any("heads of" in note for note in wide.notes)
    assert any("heads of 8" in note for note in narrow.notes)
    assert narrow.peak_bytes > 2 * wide.peak_bytes


@pytest.mark.parametrize(
    ("target", "plugin"), [("onnxruntime", "on"), ("tensorrt-10", "on"), ("tensorrt", "maybe")]
)
def test_plugin_choices_that_make_no_sense(target: str, plugin: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(Schedule.fastv(), LLAVA, target=target, plugin=plugin)
    assert caught.value.hint


def test_the_check_of_an_export_takes_no_plugin_for_granted() -> None:
    schedule = Schedule.fastv(2, "50%")
    with pytest.raises(ScheduleError, match="3840"):
        check_fits_target(schedule, schedule.resolve(LLAVA), 8064, "tensorrt-rtx")
    with pytest.raises(InputError, match="abacus"):
        check_fits_target(schedule, schedule.resolve(LLAVA), 8064, "abacus")


TENSORRT = ("tensorrt", "tensorrt-rtx", "tensorrt-10")


@pytest.mark.parametrize("target", TENSORRT)
@pytest.mark.parametrize(
    ("text", "where", "way_out"),
    [
        ("vision: [{method: prumerge}]", "vision", "ratio: 1/8"),
        ("prefill: {stages: [], threshold: {whole: 0, single: 0}}", "threshold", "keep says"),
    ],
)
def test_what_lets_an_image_decide_is_for_no_engine(
    target: str, text: str, where: str, way_out: str
) -> None:
    schedule = Schedule.parse(f"version: 1\n{text}")
    document = schedule.document
    resolved = Resolved(32, 576, (), vision=document.vision, threshold=document.prefill.threshold)
    with pytest.raises(ScheduleError) as caught:
        check_fits_target(schedule, resolved, 576, target)
    assert where in caught.value.where
    assert way_out in str(caught.value.hint)
    assert check_fits_target(schedule, resolved, 576, "onnxruntime") == ()


def test_a_static_form_is_for_every_target() -> None:
    schedule = Schedule.parse("version: 1\nvision: [{method: prumerge, ratio: 1/8}]")
    for target in TENSORRT:
        plan(schedule, LLAVA, target=target)


@pytest.mark.parametrize(
    ("target", "sms", "word"),
    [
        ("tensorrt", (), "on the device"),
        ("tensorrt", (87,), "11.4.1"),
        ("tensorrt", (87,), "tensorrt-10"),
        ("tensorrt", (110,), "7.2.2"),
        ("tensorrt-10", (110,), "Thor"),
        ("tensorrt-10", (), "written out"),
        ("tensorrt-rtx", (75, 86), "Turing"),
    ],
)
def test_what_is_good_to_know_is_noted(target: str, sms: tuple[int, ...], word: str) -> None:
    notes = plan(Schedule.fastv(), LLAVA, target=target, sms=sms).notes
    assert any(word in note for note in notes)


def test_the_report_names_target_and_sms() -> None:
    done = plan(Schedule.fastv(), LLAVA, target="tensorrt-rtx", sms=(86, 120), weights="int4")
    said = json.loads(json.dumps(done.to_json()))
    assert {name: said[name] for name in ("target", "sms", "dtype", "plugin", "limits")} == {
        "target": "tensorrt-rtx",
        "sms": [86, 120],
        "dtype": "fp16",
        "plugin": "auto",
        "limits": [],
    }


def test_weights_and_activations_are_both_asked() -> None:
    options: dict[str, Any] = {"target": "tensorrt-rtx", "sms": (86,)}
    with pytest.raises(InputError, match="no fp8"):
        plan(Schedule.fastv(), LLAVA, weights="fp8", **options)
    with pytest.raises(InputError, match="fp32"):
        plan(Schedule.fastv(), LLAVA, weights="int8", dtype="fp32", **options)
    assert plan(Schedule.fastv(), LLAVA, weights="int8", dtype="bf16", **options).dtype == "bf16"


def test_the_command_says_what_it_checked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAVA_7B))
    schedule = tmp_path / "schedule.yaml"
    schedule.write_text(f"{TEXT_ROWS.replace('text', 'last')}model: .\n")
    asked = ["plan", "-s", str(schedule), "--target", "tensorrt-rtx"]
    done = vtr(*asked, "--sm", "8.6,sm_89,120")
    assert done.code == 0
    assert "fp16 on SM 8.6, 8.9, 12.0" in done.out
    assert vtr(*asked, "--sm", "sm_86", "--json").json["sms"] == [86]
    assert "limit: " in vtr(*asked, "--sm", "75").out
    for wrong in (["--sm", "87"], ["--sm", "x"], ["--sm", ""], ["--weights", "fp32"]):
        done = vtr(*asked, *wrong, "--json")
        assert (done.code, done.json["error"]["code"]) == (2, "VTR202")
        assert done.json["error"]["where"] in (" ".join(wrong), "--sm", "--dtype fp32")
