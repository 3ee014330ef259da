"""How much of a model can be verified here: all of it, or its first layers."""

import re
from pathlib import Path

from vtr_export.errors import InputError
from vtr_export.families import ModelFacts
from vtr_export.memory import parameters

SESSION_BYTES = 4  # a parameter: ONNX Runtime computes in fp32 on a CPU, whatever the dtype
REFERENCE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
SHARE = 0.8  # of what is free: activations, the interpreter and its wheels take the rest
FLOOR_BYTES = 1 << 30
_CGROUP = Path("/sys/fs/cgroup")


def choose_scope(
    facts: ModelFacts, available_bytes: int | None = None, *, dtype: str = "fp32"
) -> str:
    """``all``, or ``layers:K`` for the most layers that fit (one at least that sees an image)."""
    free = available_memory() if available_bytes is None else available_bytes
    count = parameters(facts)
    each = SESSION_BYTES + REFERENCE_BYTES[dtype]
    layer = each * (count.layer_linear + count.layer_other)
    rest = each * count.total - facts.layers * layer
    budget = min(SHARE * free, free - FLOOR_BYTES)
    if rest + facts.layers * layer <= budget:
        return "all"
    least = facts.crosses[0] + 1 if facts.crosses else 1  # one that sees an image
    most = max(least, min(facts.layers - 1, int((budget - rest) // layer)))
    every = facts.layers // len(facts.crosses) if facts.model_type == "idefics" else 1
    return f"layers:{max(1, most // every) * every}"  # whole groups, where a file says only those


def check_scope(scope: str, layers: int) -> str:
    """``scope`` as it is written down: as many layers as the model has are all of it."""
    return "all" if layers_of(scope, layers) is None else scope


def layers_of(scope: str, layers: int) -> int | None:
    """K of ``layers:K``; None for the whole model. InputError for anything else."""
    if scope == "all":
        return None
    match = re.fullmatch(r"layers:([1-9][0-9]{0,8})", scope)
    if match is None:
        raise InputError(
            f"no verification scope {scope!r}",
            hint="auto, all, or layers:K with K from 1: the first K decoder layers",
        )
    return int(match[1]) if int(match[1]) < layers else None


def available_memory() -> int:
    """Bytes this process may still take, of the machine and of its control group."""
    limits = [_machine_free(), _group_free()]
    return min(limit for limit in limits if limit is not None)


def _machine_free() -> int:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else 8 << 30  # unknown: what most machines have


def _group_free() -> int | None:
    """Of the control group's limit; files it has cached count as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = (_CGROUP / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    cached = re.search(r"^file (\d+)$", stat, re.MULTILINE)
    return int(limit) - used + (int(cached[1]) if cached else 0)
