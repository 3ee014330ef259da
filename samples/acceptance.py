"""Accept a model on this machine: export, build, run, compare with transformers, time, report.

python samples/acceptance.py MODEL --schedule S --target tensorrt-rtx|tensorrt|onnxruntime

With .[export,cpu,rtx,samples] (or tensorrt for rtx; with --device cuda, gpu for cpu). Writes
report.json and report.html into --out. Exit status 0: all passed; 1: something failed;
3: built, and not executed because this machine has no GPU.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "support"))

TARGETS = {"onnxruntime": "ONNX Runtime", "tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
DTYPES = ("fp32", "fp16", "bf16")
DEFAULT_DTYPES = {"cpu": "fp32,fp16", "cuda": "fp16"}
WHEELS = (
    "vtr-export", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13-bindings", "tensorrt-cu13",
    "cuda-bindings", "torch", "transformers", "numpy",
)  # fmt: skip
NOT_EXECUTED = 3  # as of vtr verify
Found = dict[str, Any]


class CommandFailed(Exception):  # noqa: N818 -- what happened, for people
    """A command's exit status and last words."""


def vtr(*arguments: object, allowed: Sequence[int] = (0,)) -> Found:
    """A ``vtr`` command's JSON, with its own ``wall_seconds``; CommandFailed otherwise."""
    words = [str(argument) for argument in arguments]
    print(f"vtr {words[0]} …", file=sys.stderr, flush=True)
    command = [sys.executable, "-c", "from vtr_export.cli import main; main()", *words, "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        found = {}
    if done.returncode not in allowed:
        error = found.get("error", {})
        said = error.get("message") or f"vtr {words[0]} ended with exit status {done.returncode}"
        raise CommandFailed(said)
    return found | {"wall_seconds": round(time.perf_counter() - start, 2)}


def accept(args: argparse.Namespace) -> Found:
    """Everything, in every dtype."""
    from vtr_export import Schedule
    from vtr_export.checkpoint import find_folder, read_config

    schedule = Schedule.load(args.schedule)
    checkpoint = find_folder(args.model or schedule.model_location() or "")
    dtypes = (args.dtype or DEFAULT_DTYPES[args.device]).split(",")
    family = read_config(checkpoint)[0]["model_type"]
    runs = {dtype: run(args, schedule, checkpoint, dtype) for dtype in dtypes}
    return {
        "format": 1,
        "family": family,
        "model": checkpoint.name,
        "schedule": schedule.dump(),
        "target": args.target,
        "device": args.device,
        "machine": machine(args.device),
        "runtime": runtime(args, runs),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "runs": runs,
        "verdict": verdict(runs),
    }


def run(args: argparse.Namespace, schedule: Any, checkpoint: Path, dtype: str) -> Found:
    """One dtype: what each step found, or why it could not be taken."""
    found: Found = dict.fromkeys(("export", "build", "verify", "answers", "times", "failed"))
    place = args.out / dtype
    if not args.resume:
        shutil.rmtree(place, ignore_errors=True)
    folder = artifact = place / "artifact"
    try:
        found["export"] = once(
            place / "export.json", lambda: export(args, checkpoint, artifact, args.schedule, dtype)
        )
        if args.target != "onnxruntime":
            folder = place / args.target
            found["build"] = build(args, artifact, folder)
        found["verify"] = verify(folder)
        if not found["verify"]["executed"]:
            return found
        found["answers"] = answers(args, schedule, checkpoint, folder, dtype)
        found["times"] = times(args, checkpoint, place, folder, dtype)
    except CommandFailed as error:
        found["failed"] = str(error)
    return found


def once(file: Path, step: Callable[[], Found]) -> Found:
    """What ``step`` found, or had found when ``file`` was written."""
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    found = step()
    file.write_text(json.dumps(found), encoding="utf-8")
    return found


def export(
    args: argparse.Namespace, checkpoint: Path, out: Path, schedule: Path, dtype: str, *more: str
) -> Found:
    """Verified against the checkpoint, unless ``more`` says otherwise."""
    done = vtr("export", "--model", checkpoint, "--schedule", schedule, "--out", out,
               "--dtype", dtype, "--force", *more)  # fmt: skip
    wanted = ("verified", "scope", "seconds", "peak_rss_bytes", "vision_tokens_per_layer", "gates")
    sizes = [size for size in done["files"].values() if size is not None]
    return {name: done[name] for name in wanted} | {"bytes": sum(sizes)}


def build(args: argparse.Namespace, artifact: Path, out: Path, *more: str) -> Found:
    """Engines, and what building them took."""
    sm = ["--sm", args.sm] if args.sm else []
    done = vtr("build", artifact, "--target", args.target, "--out", out,
               "--plugin", args.plugin, *sm, *more)  # fmt: skip
    wanted = ("component", "bytes", "seconds", "peak_rss_bytes", "layers", "plugin_layers")
    engines = [{name: engine[name] for name in wanted} for engine in done["engines"]]
    kept = ("target", "tensorrt", "sms", "plugin", "seconds")
    return {name: done[name] for name in kept} | {"engines": engines}


def verify(folder: Path) -> Found:
    """Golden vectors replayed; on a machine without its GPU, an engine's files looked at."""
    done = vtr("verify", folder, allowed=(0, 1, NOT_EXECUTED))
    return {
        "executed": done.get("executed", True),
        "passed": done["passed"],
        "not_checked": done.get("not_checked", []),
        "gates": done["gates"],
    }


def answers(
    args: argparse.Namespace, schedule: Any, checkpoint: Path, folder: Path, dtype: str
) -> Found:
    """Beside transformers: the same cuts in PyTorch, and the whole model."""
    import answers as sides

    from vtr_export.errors import VtrError
    from vtr_export.verify.gates import BARS
    from vtr_export.verify.pictures import draw_picture
    from vtr_export.verify.questions import PROMPTS

    if args.questions is not None:
        asked = sides.read_questions(args.questions, args.limit)
    else:
        picture = draw_picture(args.out / "picture.png")
        asked = [sides.Asked(picture, prompt) for prompt in PROMPTS]
    print(f"ask {len(asked)} questions …", file=sys.stderr, flush=True)
    try:
        other = sides.theirs(checkpoint, schedule, dtype, asked, args.new_tokens)
        mine = sides.ours(folder, args.device, asked, args.new_tokens)
    except VtrError as error:
        raise CommandFailed(str(error)) from error
    bars = BARS[dtype]
    compared = sides.compare(asked, mine, other, bars.near_tie)
    return compared | {"passed": agrees(compared, bars), "shown": sides.shown(asked, mine, other)}


def agrees(compared: Found, bars: Any) -> bool:
    """By the bars of an export's own gates; swaps of near ties are excused, as there."""
    explained = (compared["same_keep_sets"] + compared["near_ties"]) / compared["questions"]
    logits = compared["cosine"] is None or compared["cosine"] >= bars.cosine
    return bool(logits and explained >= bars.overlap)


def times(
    args: argparse.Namespace, checkpoint: Path, place: Path, folder: Path, dtype: str
) -> Found:
    """Beside the same graph dropping nothing, or an engine built without cuts."""
    from vtr_export import Schedule

    twin: list[object] = []
    if args.target != "onnxruntime":  # an engine's kernels are chosen for what it keeps
        file = place / "unpruned.yaml"
        file.write_text(Schedule.unpruned().dump(), encoding="utf-8")
        export(args, checkpoint, place / "unpruned", file, dtype, "--no-verify")
        build(args, place / "unpruned", place / "unpruned-engine", "--unverified")
        twin = ["--against", place / "unpruned-engine"]
    done = vtr("bench", folder, *twin, "--device", args.device, "--repeats", args.repeats)
    wanted = (
        "vision_tokens", "text_tokens", "new_tokens", "repeats", "vision_encoder_ms",
        "prefill_ms", "prefill_ms_unpruned", "prefill_speedup", "predicted_prefill_speedup",
        "first_token_ms", "first_token_ms_unpruned", "decode_ms", "decode_ms_unpruned",
        "decode_speedup",
    )  # fmt: skip
    return {name: done[name] for name in wanted}


def verdict(runs: dict[str, Found]) -> str:
    """``passed``, ``failed``, or ``built, not executed: why``."""
    found = list(runs.values())
    if any(one["failed"] or one["verify"]["passed"] is False for one in found):
        return "failed"
    if any(one["answers"] is not None and not one["answers"]["passed"] for one in found):
        return "failed"
    for one in found:
        if not one["verify"]["executed"]:
            return f"built, not executed: {no_gpu(one['verify']['not_checked'])}"
    return "passed"


def no_gpu(said: Sequence[str]) -> str:
    """What ``vtr verify`` said of the machine."""
    return said[0].partition(": ")[2] or said[0] if said else "no GPU"


def machine(device: str) -> str:
    """The processor, without the machine's name; the GPU where one is asked for and there."""
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    board = Path("/proc/device-tree/model")  # of a Jetson
    if device == "cpu":
        return cpu
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if shutil.which(query[0]) is not None:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.splitlines()[0]
    return board.read_text(encoding="utf-8").strip("\0\n") if board.is_file() else cpu


def runtime(args: argparse.Namespace, runs: dict[str, Found]) -> str:
    """What runs it, with its version; of engines, the one that built them."""
    built = [run["build"]["tensorrt"] for run in runs.values() if run["build"]]
    wheel = "onnxruntime" if args.device == "cpu" else "onnxruntime-gpu"
    found = built[0] if built else versions().get(wheel if args.target == "onnxruntime" else "")
    return f"{TARGETS[args.target]} {found or '(version unknown)'}"


def versions() -> dict[str, str]:
    """Of every package that matters here and is installed."""
    found = {"python": platform.python_version()}
    for wheel in WHEELS:
        try:
            found[wheel] = version(wheel)
        except PackageNotFoundError:
            continue
    return found


def recorded(found: Found) -> Found:
    """What the README is made of: without each gate, each answer and the schedule."""
    runs = {}
    for dtype, run in found["runs"].items():
        short = {
            step: found and {k: v for k, v in found.items() if k not in ("gates", "shown")}
            for step, found in run.items()
            if step != "failed"
        }
        runs[dtype] = short | {"failed": run["failed"]}
    return {k: v for k, v in found.items() if k != "schedule"} | {"runs": runs}


def write(file: Path, found: Found) -> None:
    file.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="checkpoint; default: what the schedule names")
    parser.add_argument("--schedule", type=Path, required=True)
    parser.add_argument("--target", choices=TARGETS, default="onnxruntime")
    parser.add_argument("--device", choices=DEFAULT_DTYPES, help="default: cpu, of engines cuda")
    parser.add_argument("--dtype", help="some of fp32,fp16,bf16; default: fp16, on a CPU fp32 too")
    parser.add_argument("--sm", help="GPUs to build for; default: the one that is here")
    parser.add_argument("--plugin", default="auto", help="as of vtr build")
    parser.add_argument("--questions", type=Path, help="JSON Lines: image, question, answers")
    parser.add_argument("--limit", type=int, help="ask the first so many only")
    parser.add_argument("--new-tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--resume", action="store_true", help="keep the artifact that is in --out")
    parser.add_argument("--out", type=Path, default=Path("out/acceptance"))
    parser.add_argument("--record", type=Path, help="write what the README needs")
    args = parser.parse_args()
    args.device = args.device or ("cpu" if args.target == "onnxruntime" else "cuda")
    if args.target != "onnxruntime" and args.device == "cpu":
        parser.error("engines run on a GPU only: leave --device out")
    if wrong := set((args.dtype or "fp16").split(",")) - set(DTYPES):
        parser.error(f"no dtype {min(wrong)!r}")
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    from vtr_export.errors import VtrError

    try:
        found = accept(args)
    except VtrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    import report

    write(args.out / "report.json", found)
    if args.record is not None:
        write(args.record, recorded(found))
    (args.out / "report.html").write_text(report.page(found), encoding="utf-8")
    print(f"{found['verdict']}\n{args.out / 'report.html'}")
    sys.exit({"passed": 0, "failed": 1}.get(found["verdict"], NOT_EXECUTED))


if __name__ == "__main__":
    main()
