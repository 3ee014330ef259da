"""Run the digits sample on this machine and write down what ran.

python samples/support/record.py samples/support/NAME.json [--device cuda]
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from vtr_export import Artifact, export
from vtr_export.manifest import Manifest
from vtr_export.runtime.artifact import Request

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "samples" / "digits"
DTYPES = {"cpu": ("fp32", "fp16"), "cuda": ("fp32", "fp16", "bf16")}
WHEEL = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}
BUILDER, WHEEL_OF_BUILDER = "tensorrt_rtx_bindings", "tensorrt-rtx-cu13-bindings"
BUILT = "fp16"  # fp32 has no fused attention there
BATCH = 32


def answers(artifact: Path, device: str) -> dict[str, int]:
    """How many of the shipped questions get an answer on ``device``, and the right one."""
    lines = (DIGITS / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    loaded, right = Artifact.load(artifact, device=device), 0
    for start in range(0, len(rows), BATCH):
        chunk = rows[start : start + BATCH]
        asked = [Request(row["question"], [DIGITS / row["image"]]) for row in chunk]
        given = loaded.generate_batch(asked)
        right += sum(a.text in row["answers"] for a, row in zip(given, chunk, strict=True))
    return {"questions": len(rows), "right": right}


def build(artifact: Path, vision_tokens: int) -> dict[str, Any] | None:
    """What TensorRT-RTX makes of the decoder, without a GPU; None where its wheel is missing."""
    if importlib.util.find_spec(BUILDER) is None:
        return None
    decoder = artifact.parent / "decoder.onnx"
    onnx.save(onnx.load(artifact / "onnx" / "decoder_model_merged.onnx"), decoder)
    child = [sys.executable, ROOT / "tests" / "tensorrt_child.py", decoder, str(vision_tokens)]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if found["errors"]:
        raise SystemExit("\n".join(found["errors"]))
    return {"builder": f"TensorRT-RTX {version(WHEEL_OF_BUILDER)}", "dtypes": [BUILT]}


def machine(device: str) -> str:
    """The processor, without the machine's name."""
    if device == "cpu":
        return f"{platform.machine()} CPU, {os.cpu_count()} cores"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]


def record(device: str) -> dict[str, Any]:
    """Export in every dtype, verified; answer on ``device``; build."""
    executed, built, family = {}, None, ""
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES[device]:
            artifact = Path(folder) / dtype
            export(DIGITS / "schedule.yaml", out=artifact, dtype=dtype, progress=print)
            facts = Manifest.load(artifact).model
            family = facts.model_type
            executed[dtype] = answers(artifact, device)
            if dtype == BUILT:
                built = build(artifact, facts.tokens_per_image or 0)
    return {
        "family": family,
        "machine": machine(device),
        "device": device,
        "runtime": f"ONNX Runtime {version(WHEEL[device])}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "executed": executed,
        "built": built,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=DTYPES, default="cpu")
    args = parser.parse_args()
    found = json.dumps(record(args.device), indent=2)
    args.out.write_text(found + "\n", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
