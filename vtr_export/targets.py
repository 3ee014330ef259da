"""What each target serves: SMs, number types, limits. One table; a plan and a builder ask it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vtr_export.errors import InputError

TARGETS: Final = ("onnxruntime", "tensorrt", "tensorrt-rtx", "tensorrt-10")
PLUGINS: Final = ("auto", "on", "off")
TOP_K: Final = 3840  # the largest k of the TopK layer of every TensorRT


@dataclass(frozen=True)
class Sm:
    """A compute capability times ten: its architecture, and whether TensorRT-RTX builds for it."""

    number: int
    architecture: str
    rtx: bool = False

    def __str__(self) -> str:
        return f"SM {self.number // 10}.{self.number % 10} ({self.architecture})"


_SMS: Final = (
    Sm(75, "Turing", rtx=True),
    Sm(80, "Ampere, A100", rtx=True),
    Sm(86, "Ampere, RTX 30", rtx=True),
    Sm(87, "Ampere, Jetson Orin"),
    Sm(88, "Ampere"),  # nvcc 13.0 compiles it
    Sm(89, "Ada, RTX 40", rtx=True),
    Sm(90, "Hopper"),
    Sm(100, "Blackwell, B200"),
    Sm(103, "Blackwell, B300"),
    Sm(110, "Blackwell, Jetson Thor"),
    Sm(120, "Blackwell, RTX 50", rtx=True),
    Sm(121, "Blackwell, GB10", rtx=True),
)
SMS: Final[Mapping[int, Sm]] = {sm.number: sm for sm in _SMS}
RTX_SMS: Final = tuple(sm.number for sm in _SMS if sm.rtx)
TURING, ORIN, THOR = 75, 87, 110

# The first SM that has it. TensorRT-RTX's support matrix (1.0 to 1.5): Turing has neither BF16 nor
# weight-only INT8 and INT4; FP8 came with Ada, FP4 with Blackwell. fp32 is what activations and
# norms may be: a matrix product in fp32 is not compiled for Turing (seen with 1.7.1).
FIRST_SM: Final[Mapping[str, int]] = {
    "fp32": 75,
    "fp16": 75,
    "bf16": 80,
    "int8": 80,
    "int4": 80,
    "fp8": 89,
    "fp4": 100,
}
# seen with 1.7.1, any SM, at any size: Myelin's is_const(); with our plugin it does
SANDWICHED: Final = (
    "TensorRT-RTX does not compile a cut ahead of layers that norm what attention and MLP give"
)
FUSED_HEAD_DIMS: Final = range(16, 257, 8)  # seen with TensorRT-RTX 1.7.1, fp16 and bf16, any SM
_FUSED_ATTENTION: Final = ("tensorrt", "tensorrt-rtx")  # with no kernel for fp32


def parse_sm(text: str) -> int:
    """``86``, ``8.6``, ``sm86`` or ``sm_86`` → 86; InputError for what no GPU is."""
    found = re.fullmatch(r"(?:sm[_ ]?)?(\d+)(?:\.(\d))?", text.strip().lower())
    number = int("".join(part for part in found.groups() if part)) if found else 0
    if number not in SMS:
        raise InputError(f"no SM {text.strip()!r}", where="--sm", hint=f"one of: {_listed(SMS)}")
    return number


def parse_sms(text: str) -> tuple[int, ...]:
    """``86,8.9,sm_120`` → (86, 89, 120): ascending, each once; InputError for none."""
    parts = [part for part in text.split(",") if part.strip()]
    if not parts:
        raise InputError("no SM is named", where="--sm", hint=f"some of: {_listed(SMS)}")
    return tuple(sorted({parse_sm(part) for part in parts}))


def check_name(target: str) -> None:
    """InputError for what is no target."""
    if target not in TARGETS:
        raise InputError(
            f"no target {target!r}", where="--target", hint=f"one of: {', '.join(TARGETS)}"
        )


def check_target(target: str, sms: tuple[int, ...], dtype: str) -> None:
    """Refuse what ``target`` cannot build: an SM it does not serve, a type the SM lacks.

    ``sms`` may be empty: then only what holds on every SM is refused. ``dtype`` is a key of
    ``FIRST_SM``: what a decoder computes in, or how its weights are held. Raises InputError.
    """
    check_name(target)
    if dtype not in FIRST_SM:
        raise InputError(f"no dtype {dtype!r}", hint=f"one of: {', '.join(FIRST_SM)}")
    if target == "onnxruntime":
        _check_no_sm(sms)
        return
    for number in sms:
        _check_served(target, number)
        _check_dtype(number, dtype)
    if dtype == "fp32" and target in _FUSED_ATTENTION:
        raise InputError(
            f"{target} has no fused attention in fp32, and builds none unfused",
            where="--dtype fp32",
            hint="export with --dtype fp16 or bf16; norms, softmax and scores stay fp32 in both",
        )


def _check_no_sm(sms: tuple[int, ...]) -> None:
    if sms:
        raise InputError(
            "onnxruntime builds for no SM",
            where=f"--sm {','.join(map(str, sms))}",
            hint="leave --sm out, or give --target tensorrt-rtx",
        )


def _check_served(target: str, number: int) -> None:
    if number not in SMS:
        raise InputError(f"no SM {number}", where="--sm", hint=f"one of: {_listed(SMS)}")
    if target == "tensorrt-rtx" and number not in RTX_SMS:
        raise InputError(
            f"TensorRT-RTX does not serve {SMS[number]}",
            where=f"--sm {number}",
            hint=f"use --target tensorrt on the device itself; TensorRT-RTX: {_listed(RTX_SMS)}",
        )


def _check_dtype(number: int, dtype: str) -> None:
    first = FIRST_SM[dtype]
    if number < first:
        raise InputError(
            f"{SMS[number]} has no {dtype}, only from {first // 10}.{first % 10} on",
            where=f"--sm {number}",
            hint="use fp16, or leave this SM out",
        )


def target_notes(target: str, sms: tuple[int, ...]) -> tuple[str, ...]:
    """What a user of ``target`` on ``sms`` should know, and no error is."""
    notes = []
    if target == "tensorrt":
        notes.append(
            "TensorRT builds for the GPU it runs on: build on the device, once for each SM"
        )
        if ORIN in sms or THOR in sms:
            notes.append("Jetson: JetPack 7.2.2 or later with TensorRT 11.4.1 or later")
        if ORIN in sms:
            notes.append("a Jetson Orin that stays on JetPack 6 has TensorRT 10: see tensorrt-10")
    if target == "tensorrt-10":
        notes.append("attention is written out: n x n scores are held, unless TensorRT 10 fuses it")
    if target == "tensorrt-10" and THOR in sms:
        notes.append("JetPack 6 has no Thor; JetPack 7 has TensorRT 11.4.1: --target tensorrt")
    if target == "tensorrt-rtx" and TURING in sms and len(sms) > 1:
        notes.append("a plan for Turing and later GPUs is slower on the later: build two")
    return tuple(notes)


def fuses_attention(target: str, head_dim: int) -> bool:
    """Whether ``target`` computes attention with heads of this width without n x n scores."""
    return target in _FUSED_ATTENTION and head_dim in FUSED_HEAD_DIMS


def _listed(numbers: Mapping[int, Sm] | tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
