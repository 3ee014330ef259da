"""The command line: exit statuses, streams, and what needs no artifact."""

import io
import json
import os
import resource
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from command import vtr
from test_families import LLAVA_7B, tiny

from vtr_export import exporter
from vtr_export.cli import export_main
from vtr_export.cli.app import app
from vtr_export.errors import GateError
from vtr_export.exporter import Report
from vtr_export.schedule import Schedule

COMMANDS = ["export", "plan", "run", "verify", "bench", "inspect", "doctor", "schedule"]
MAKERS = [
    "fastv",
    "pyramid",
    "sparsevlm",
    "fitprune",
    "mustdrop",
    "ficoco",
    "vtw",
    "keeps",
    "show",
    "convert",
    "diff",
]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that holds only a config: 3 layers, 4 tokens an image."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder / "config.json", json.dumps(tiny()))
    return folder


@pytest.fixture
def schedule(tmp_path: Path, model: Path) -> Path:
    text = "version: 1\nmodel: model\nprefill: {stages: [{before_layer: 1, keep: 50%}]}\n"
    return write(tmp_path / "schedule.yaml", text)


def test_help_names_every_command_and_starts_at_once() -> None:
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", "from vtr_export.cli import main; main()", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert not any(
        line.startswith("  ") and line.endswith("...") for line in done.stdout.splitlines()
    )
    assert min(seconds) < 0.3


def test_the_command_line_starts_without_heavy_wheels() -> None:
    heavy = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "numpy", "pydantic", "rich")
    probe = f"import sys, vtr_export.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [*COMMANDS, *(f"schedule {name}" for name in MAKERS)])
def test_every_command_explains_itself(command: str) -> None:
    done = vtr(*command.split(), "--help")
    assert done.code == 0
    assert done.out.startswith("Usage: ")


def test_vtr_export_is_vtr_export() -> None:
    short, long = vtr("--help", entry=export_main), vtr("export", "--help")
    assert short.code == 0
    assert short.out.splitlines()[1:] == long.out.splitlines()[1:]


def test_the_version() -> None:
    assert vtr("--version").out.strip() == "0.1.0"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["plan"],
        ["plan", "--schedule"],
        ["plan", "--schedule", "s.yaml", "--batch", "many"],
        ["export", "--schedule", "s.yaml"],
        ["export", "--schedule", "s.yaml", "--out", "o", "--dtype", "fp8"],
        ["run", "artifact"],
        ["schedule", "keeps"],
    ],
)
def test_a_usage_error_exits_2_without_a_traceback(arguments: list[str]) -> None:
    done = vtr(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Error: " in done.err
    assert "Traceback" not in done.err
    first, *rest = arguments
    assert vtr(first, "--json", *rest).json["error"]["code"] == "usage"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], "VTR001"),
        (["--convention", "F-Z"], "VTR202"),
        (["--device", "toaster"], "VTR202"),
        (["--memory", "much"], "VTR202"),
        (["--batch", "0"], "VTR202"),
        (["--model", "nowhere/at all"], "VTR002"),
    ],
)
def test_bad_input_exits_2_and_says_how_to_go_on(
    tmp_path: Path, schedule: Path, arguments: list[str], code: str
) -> None:
    given = schedule if arguments else tmp_path / "missing.yaml"
    done = vtr("plan", "--schedule", given, *arguments, "--json")
    assert done.code == 2
    assert done.err.startswith(f"error[{code}]: ")
    assert "help: " in done.err
    assert done.json["error"]["code"] == code


def test_an_error_without_json_leaves_stdout_alone(tmp_path: Path) -> None:
    done = vtr("plan", "--schedule", tmp_path / "missing.yaml")
    assert (done.code, done.out) == (2, "")


def test_a_failed_gate_exits_1(monkeypatch: pytest.MonkeyPatch, schedule: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise GateError("layer 3 deviates", hint="see the manifest")

    monkeypatch.setattr(exporter, "export", fail)
    done = vtr("export", "--schedule", schedule, "--out", "out")
    assert (done.code, done.out) == (1, "")
    assert done.err == "error[VTR401]: layer 3 deviates\n  help: see the manifest\n"


def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, schedule: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(exporter, "export", fail)
    done = vtr("export", "--schedule", schedule, "--out", "out", "--json")
    assert done.code == 70  # neither a gate nor the input
    assert 'raise ValueError("a bug")' in done.err
    assert done.json["error"]["code"] == "bug"


def test_verify_and_no_verify_exclude_each_other(schedule: Path) -> None:
    arguments = ["--schedule", schedule, "--out", "out", "--verify", "layers:2", "--no-verify"]
    assert vtr("export", *arguments).code == 2


def test_plan_counts_as_the_literature_does(tmp_path: Path) -> None:
    folder = tmp_path / "llava"
    folder.mkdir()
    write(folder / "config.json", json.dumps(LLAVA_7B))
    file = write(tmp_path / "pyramid.yaml", Schedule.pyramid(0.5).dump())
    arguments = ["--model", folder, "--convention", "F-A", "--text-tokens", 0, "--json"]
    said = vtr("plan", "--schedule", file, *arguments).json
    assert said["total"] == pytest.approx(1.777e12, rel=0.0005)
    assert said["unpruned"] == pytest.approx(3.817e12, rel=0.0005)
    assert said["ratio"] == pytest.approx(said["total"] / said["unpruned"])
    assert said["vision_tokens_per_layer"] == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8


def test_a_relative_model_lies_beside_the_schedule(
    schedule: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert vtr("plan", "--schedule", schedule, "--json").json["vision_tokens_per_layer"] == [
        4,
        2,
        2,
    ]


def test_plan_for_people(schedule: Path) -> None:
    done = vtr("plan", "--schedule", schedule, "--device", "cpu", "--memory", "1GiB")
    assert done.code == 0
    assert "vision tokens per layer: 4 x1, 2 x2" in done.out
    assert "fits 1 GiB" in done.out


def test_plan_warns_on_stderr(schedule: Path) -> None:
    done = vtr("plan", "--schedule", schedule, "--text-tokens", 10_000_000, "--json")
    assert "warning: " in done.err
    assert done.json["notes"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fastv", "--k", 2, "--r", "0.5"], Schedule.fastv(2, 0.5)),
        (["fastv", "--k", 3, "--r", "1/3", "--tokens", 576], Schedule.fastv(3, "1/3", tokens=576)),
        (["pyramid", "--ratio", "50%", "--layers", 8], Schedule.pyramid("50%", layers=8)),
        (
            ["pyramid", "--positions", "repacked"],
            Schedule.pyramid(positions="repacked"),
        ),
        (["sparsevlm", "--tokens", 64], Schedule.sparsevlm(64)),
        (["sparsevlm", "--plus"], Schedule.sparsevlm(192, plus=True)),
        (["fitprune", "--reduction", "0.5"], Schedule.fitprune("50%")),
        (["mustdrop", "--tokens", 64], Schedule.mustdrop(64)),
        (["mustdrop", "--windows", 40], Schedule.mustdrop(192, windows=40)),
        (["ficoco", "--vision", 42], Schedule.ficoco(42)),
        (
            ["ficoco", "--prefill", 6, "--tokens", 191, "--layers", 8],
            Schedule.ficoco(prefill=6, tokens=191, layers=8),
        ),
        (["vtw", "--k", 5], Schedule.vtw(5)),
        (["keeps", 4, 4, "50%"], Schedule.from_keeps([4, 4, "50%"])),
        (
            ["keeps", "4,4,2", "--rank", "per_image"],
            Schedule.from_keeps([4, 4, 2], rank="per_image"),
        ),
    ],
)
def test_schedules_are_made(tmp_path: Path, arguments: list[object], expected: Schedule) -> None:
    said = vtr("schedule", *arguments)
    assert Schedule.parse(said.out) == expected
    file = tmp_path / "made.yaml"
    assert vtr("schedule", *arguments, "--out", file).code == 0
    assert Schedule.load(file) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["fastv", "--r", "2"],
        ["vtw", "--k", 0],
        ["keeps", "2", "4"],
        ["keeps", "x"],
        ["sparsevlm", "--tokens", 100],
        ["fitprune", "--reduction", "70%"],
        ["mustdrop", "--tokens", 100],
        ["mustdrop", "--windows", -1],
        ["ficoco"],
        ["ficoco", "--vision", 0],
        ["ficoco", "--prefill", 3, "--layers", 6],
    ],
)
def test_an_impossible_schedule_is_refused(arguments: list[object]) -> None:
    done = vtr("schedule", *arguments)
    assert done.code == 2
    assert done.err.startswith("error[VTR001]: ")


def test_an_unwritable_schedule_is_refused(tmp_path: Path) -> None:
    assert vtr("schedule", "fastv", "--out", tmp_path / "no" / "such" / "folder.yaml").code == 2


def test_show_resolves_for_the_model(schedule: Path) -> None:
    said = vtr("schedule", "show", schedule, "--json").json
    assert said["vision_tokens_per_layer"] == [4, 2, 2]
    assert said["cuts"] == [{"before_layer": 1, "keep": [2, 4]}]
    assert "vision tokens per layer: 4 x1, 2 x2" in vtr("schedule", "show", schedule).out


@pytest.mark.parametrize("form", ["keep", "stages"])
def test_convert_says_the_same_in_another_folder(tmp_path: Path, schedule: Path, form: str) -> None:
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "converted.yaml"
    assert vtr("schedule", "convert", schedule, "--to", form, "--out", file).code == 0
    assert vtr("plan", "--schedule", file, "--json").json["vision_tokens_per_layer"] == [4, 2, 2]
    assert getattr(Schedule.load(file).prefill, form) is not None


def test_diff_shows_what_differs(tmp_path: Path, schedule: Path) -> None:
    same = write(tmp_path / "same.yaml", Schedule.load(schedule).dump())
    other = write(tmp_path / "other.yaml", Schedule.fastv(2, 0.5).dump())
    assert vtr("schedule", "diff", schedule, same, "--json").json == {"equal": True, "diff": []}
    assert "+  - {before_layer: 2, keep: 50%}" in vtr("schedule", "diff", schedule, other).out


def test_show_draws_without_a_model(tmp_path: Path) -> None:
    file = write(tmp_path / "pyramid.yaml", Schedule.pyramid().dump())
    shown = vtr("schedule", "show", file)
    last = shown.out.splitlines()[-1].split()
    assert (shown.code, last[:2]) == (0, ["24-", "12.5%"])
    known = vtr("schedule", "show", file, "--layers", 32, "--tokens", 576, "--json").json
    assert known["vision_tokens_per_layer"] == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert known["mean_share"] == (1 + 1 / 2 + 1 / 4 + 1 / 8) / 4
    assert vtr("schedule", "show", file, "--layers", 8, "--tokens", 576).code == 2


def test_show_goes_on_where_the_named_model_is_out_of_reach(tmp_path: Path) -> None:
    text = "version: 1\nmodel: nobody/has-this\nprefill: {keep: [9, 4]}\n"
    file = write(tmp_path / "s.yaml", text)
    shown = vtr("schedule", "show", file, "--json")
    assert shown.json["vision_tokens_per_layer"] == [9, 4]
    assert "nobody/has-this" in shown.err
    assert vtr("schedule", "show", file, "--model", "nobody/has-this").code == 2


def test_show_and_diff_draw_several_schedules(tmp_path: Path, schedule: Path, model: Path) -> None:
    other = write(tmp_path / "other.yaml", Schedule.from_keeps([4, 4, 1]).dump())
    picture = tmp_path / "both.svg"
    shown = vtr("schedule", "show", schedule, other, "--picture", picture, "--json")
    kept = [each["vision_tokens_per_layer"] for each in shown.json["schedules"]]
    assert kept == [[4, 2, 2], [4, 4, 1]]
    assert picture.read_text(encoding="utf-8").startswith("<?xml")
    apart = vtr("schedule", "diff", schedule, other, "--model", model, "--picture", picture)
    rows = [line.split() for line in apart.out.splitlines()[-3:]]
    assert [(row[-4], row[-2]) for row in rows] == [("4", "4"), ("2", "4"), ("2", "1")]
    assert vtr("schedule", "show", other, "--picture", tmp_path / "x.gif").code == 2


def test_a_terminal_without_blocks_gets_hashes(schedule: Path) -> None:
    command = [sys.executable, "-c", "from vtr_export.cli import main; main()"]
    for encoding, mark in (("ascii", "#"), ("utf-8", "█")):
        done = subprocess.run(
            [*command, "schedule", "show", schedule],
            capture_output=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONIOENCODING": encoding},
            check=True,
        )
        assert done.stdout.rstrip().endswith(mark)


def test_convert_reads_and_writes_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "--layer_list '[8,16,24]' --image_token_ratio_list '[0.5,0.25,0.125]'"
    recipe = write(tmp_path / "eval.sh", f"python -m eval {line} --temperature 0")
    file = tmp_path / "pyramid.yaml"
    assert vtr("schedule", "convert", recipe, "--tokens", 577, "--out", file).code == 0
    kept = [stage.keep for stage in Schedule.load(file).prefill.stages or ()]
    assert kept == [288, 144, 72]
    back = vtr("schedule", "convert", recipe, "--to", "pyramiddrop")
    assert back.out == f"{line}\n"
    refused = vtr("schedule", "convert", file, "--to", "fastv")
    assert (refused.code, refused.out) == (2, "")
    assert "drops once" in refused.err
    lost = vtr("schedule", "convert", recipe, "--to", "keep")
    assert "--layers" in lost.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("K: 2\nR: 0.5\n"))
    given = ["--from", "fastv", "--to", "keep", "--layers", 3, "--tokens", 9]
    piped = vtr("schedule", "convert", "-", *given)
    assert Schedule.parse(piped.out).prefill.keep == (9, 9, 4)


def test_convert_keeps_shares_where_tokens_vary(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", Schedule.fastv(1).dump())
    said = vtr("schedule", "convert", file, "--to", "keep", "--layers", 3)
    assert Schedule.parse(said.out).prefill.keep == (1, Fraction(1, 2), Fraction(1, 2))


def test_commands_have_one_line_of_help() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert len((command.callback.__doc__ or "").splitlines()[0]) <= 80


def test_bench_says_what_was_predicted_beside_what_was_measured(
    exported: tuple[Path, Report],
) -> None:
    folder, _ = exported
    sizes = ["--text-tokens", 8, "--new-tokens", 2]
    planned = vtr(
        *("plan", "-s", folder / "schedule.yaml", "-m", folder, *sizes),
        *("--device", "h100", "--weights", "fp32", "--json"),
    ).json
    done = vtr("bench", folder, *sizes, "--predict", "h100", "--json")
    said = done.json
    assert said["predicted_prefill_speedup"] == planned["ideal_speedup"]
    for suffix in ("", "_unpruned"):
        assert said[f"predicted_first_token_ms{suffix}"] == planned[f"ttft_ms{suffix}"]
        assert said[f"predicted_decode_ms{suffix}"] == planned[f"tpot_ms{suffix}"]
        assert said[f"first_token_ms{suffix}"] > said[f"prefill_ms{suffix}"] > 0
    assert said["prefill_speedup"] == said["prefill_ms_unpruned"] / said["prefill_ms"]
    assert "run 7 of 7" in done.err
    head, *rows = vtr("bench", folder, *sizes).out.splitlines()[:4]
    assert head.split() == ["unpruned", "predicted", "pruned", "predicted", "speed-up", "predicted"]
    assert [row[:16].strip() for row in rows] == ["prefill", "first token", "each next token"]


def test_inspect_shows_layers_cuts_and_streams(exported: tuple[Path, Report]) -> None:
    said = vtr("inspect", exported[0], "--json").json
    decoder = next(graph for graph in said["graphs"] if "decoder" in graph["file"])
    assert [layer["index"] for layer in decoder["layers"]] == [0, 1, 2]
    assert [(cut["before_layer"], cut["keep"]) for cut in decoder["cuts"]] == [(1, "8 of 16")]
    assert said["artifact"]["schedule"]["keep_per_layer"] == [16, 8, 8]
    assert "cut before layer 1: keeps " in vtr("inspect", exported[0]).out
