"""The fused cut on a GPU: against its definition, the memory traffic it cannot avoid, and torch.

python samples/bench/gpu_kernel.py

Fresh random inputs each run: heads 32/8 of 128, hidden states of 4096, half of 640, 2,880 and 8,192
vision tokens among 64 of text, half of it behind the image. The last row asks; then, in a table of
its own, all 32 rows behind the image. Every call is checked against numpy in double precision
before it is timed. Times are of CUDA graphs that walk through more inputs than the L2 cache holds,
so that no call finds its keys there; the floor is the bytes a call must move, at the bandwidth of a
copy from device to device that is measured in the same run. Needs a GPU, torch with CUDA,
cuda-bindings and nvidia-cuda-nvrtc, and exits with 2 where one is missing.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from measure import GIB, head, say, table, verdict

from vtr_export.backends.tensorrt import kernel
from vtr_export.errors import VtrError

HERE = Path(__file__).parent
TOKENS, TEXT = (640, 2880, 8192), 64
QUERIES: tuple[kernel.Query, ...] = ("last", "text")
HEADS, KV_HEADS, HEAD_DIM, WIDTH = 32, 8, 128, 4096
SCALE = HEAD_DIM**-0.5
FLOOR_BAR, UNFUSED_BAR = 2.0, 5.0
COPY_BYTES = GIB
Array = np.ndarray[Any, Any]
NEAR = 1e-3  # of a score: what fp16 sums may order either way


@dataclass(frozen=True)
class Times:
    """Of one size, in microseconds."""

    vision: int
    kernel_us: float
    floor_us: float
    unfused_us: float


def shape_of(vision: int, text: int = TEXT, query: kernel.Query = "last") -> kernel.Shape:
    """One prompt, half of whose vision tokens stay."""
    rows = text if query == "text" else 1
    return kernel.Shape(
        batch=1,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        query_rows=rows,
        mask_rows=rows,
        total=vision + text,
        new=vision + text,
        vision=vision,
        keep=vision // 2,
        hidden=WIDTH,
        query=query,
    )


def floor_bytes(shape: kernel.Shape, dtype: str) -> int:
    """What must be read and written once: no cut can move less."""
    element = kernel.DTYPES[dtype]
    reads = {
        "query": element * shape.batch * shape.heads * shape.head_dim,
        "keys": element * shape.batch * shape.kv_heads * shape.total * shape.head_dim,
        "mask": shape.batch * shape.total,
        "vision_index": 8 * shape.batch * shape.vision,
        "hidden": element * shape.batch * shape.kept * shape.hidden,
    }
    writes = reads["hidden"] + 8 * shape.batch * (shape.kept + shape.keep)
    return sum(reads.values()) + writes


def draw(torch: Any, shape: kernel.Shape, dtype: Any, device: str) -> dict[str, Any]:
    """Random inputs of one call: every token is real, half of the text stands before the image.

    ``query`` and the causal ``mask`` have the last rows alone, those that may ask.
    """

    def normal(*size: int) -> Any:
        return torch.randn(*size, device=device, dtype=torch.float32).to(dtype)

    batch, rows, total = shape.batch, shape.query_rows, shape.total
    causal = torch.ones(rows, total, dtype=torch.bool, device=device).tril(total - rows)
    first = (shape.new - shape.vision) // 2
    columns = torch.arange(first, first + shape.vision, device=device)
    return {
        "query": normal(batch, shape.heads, rows, shape.head_dim),
        "keys": normal(batch, shape.kv_heads, total, shape.head_dim),
        "mask": causal.expand(batch, 1, -1, -1).contiguous(),
        "vision_index": columns.expand(batch, -1).contiguous(),
        "budget": torch.full((batch,), shape.keep, device=device),
        "hidden": normal(batch, shape.new, shape.hidden),
    }


def unfused(torch: Any, inputs: dict[str, Any], keep: int) -> tuple[Any, Any, Any]:
    """The cut, one operator of torch after the other, as the function's body has them."""
    query, keys, hidden, vision = (
        inputs[name] for name in ("query", "keys", "hidden", "vision_index")
    )
    batch, heads, count, width = query.shape
    kv_heads, total, length = keys.shape[1], keys.shape[2], hidden.shape[1]
    asks = -(-count // 2)  # half of the text stands behind the image
    scaled = query[:, :, -asks:].float() * SCALE
    rows = scaled.reshape(batch, kv_heads, heads // kv_heads * asks, width)
    logits = (keys.float() @ rows.mT).mT.reshape(batch, heads, asks, total)
    visible, seen = inputs["mask"][:, :, -asks:], inputs["mask"][:, 0, -1]
    probability = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    at = vision + (total - length)
    score = probability.mean((1, 2)).gather(1, at)
    score = torch.where(score.isnan(), -1.0, score)
    score = torch.where(seen.gather(1, at), score, -2.0)
    chosen = vision.gather(1, score.topk(keep).indices)
    alive = torch.ones_like(hidden[:, :, 0], dtype=torch.int64)
    alive = alive.scatter(1, vision, 0).scatter(1, chosen, 1)
    kept_vision = torch.zeros_like(alive).scatter(1, chosen, 1)
    kept = length - vision.shape[1] + keep
    place, slot = alive.cumsum(1) - 1, kept_vision.cumsum(1) - 1
    empty = alive.new_zeros(batch, length + 1)
    columns = torch.arange(length, device=alive.device).expand_as(alive)
    indices = empty.scatter(1, torch.where(alive > 0, place, length), columns)[:, :kept]
    placed = empty.scatter(1, torch.where(kept_vision > 0, slot, length), place)[:, :keep]
    gathered = hidden.gather(1, indices[:, :, None].expand(-1, -1, hidden.shape[2]))
    return gathered, indices, placed


def scores(query: Array, keys: Array, vision: Array, length: int) -> Array:
    """[B,V], from the definition, in double precision; half of the rows ask, the last at least."""
    group, total = query.shape[1] // keys.shape[1], keys.shape[2]
    keys, score = np.repeat(keys, group, 1), np.zeros((len(query), total))
    asks = -(-query.shape[2] // 2)
    for row in range(-asks, 0):
        seen = total + row + 1
        logits = np.einsum("bhd,bhtd->bht", query[:, :, row], keys[:, :, :seen]) * SCALE
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        score[:, :seen] += (odds / odds.sum(-1, keepdims=True)).mean(1) / asks
    return np.take_along_axis(score, vision + total - length, 1)


def faults(score: Array, vision: Array, hidden: Array, outputs: Sequence[Array]) -> list[str]:
    """What is wrong with the outputs of one call; scores nearer than ``NEAR`` may swap."""
    found = []
    for row, (rows, indices, places) in enumerate(zip(*outputs, strict=True)):
        text = np.setdiff1d(np.arange(hidden.shape[1]), vision[row])
        kept = np.isin(vision[row], indices)
        if (np.diff(indices) <= 0).any():
            found.append(f"row {row}: order is lost")
        if not np.isin(text, indices).all():
            found.append(f"row {row}: text is lost")
        if kept.sum() != len(places) or not np.isin(indices[places], vision[row]).all():
            found.append(f"row {row}: vision tokens are miscounted")
        elif 0 < kept.sum() < len(kept):
            worst, best = score[row, kept].min(), score[row, ~kept].max()
            if worst < best * (1 - NEAR):
                found.append(f"row {row}: a token of score {best:.3g} lost to one of {worst:.3g}")
        if rows.tobytes() != hidden[row, indices].tobytes():
            found.append(f"row {row}: other rows were gathered")
    return found


def report(times: Sequence[Times], text: Sequence[Times], bandwidth: float) -> str:
    """The tables, where the last row asks and where text does; ``bandwidth`` in bytes a second."""
    rows: list[Sequence[object]] = [
        ("n", "keep", "kernel", "floor", "of floor", f"<= {FLOOR_BAR:g}", "unfused", "speed-up",
         f">= {UNFUSED_BAR:g}"),
        *((t.vision, t.vision // 2, f"{t.kernel_us:.1f} us", f"{t.floor_us:.1f} us",
           f"{t.kernel_us / t.floor_us:.2f}", verdict(t.kernel_us <= FLOOR_BAR * t.floor_us),
           f"{t.unfused_us:.1f} us", f"{t.unfused_us / t.kernel_us:.1f}",
           verdict(t.unfused_us >= UNFUSED_BAR * t.kernel_us)) for t in times),
    ]  # fmt: skip
    asked: list[Sequence[object]] = [
        ("n", "keep", "kernel", "unfused", "speed-up"),
        *((t.vision, t.vision // 2, f"{t.kernel_us:.1f} us", f"{t.unfused_us:.1f} us",
           f"{t.unfused_us / t.kernel_us:.1f}") for t in text),
    ]  # fmt: skip
    copied = f"A copy moves {bandwidth / 1e9:.0f} GB/s."
    return f"{copied}\n\n{table(rows)}\n\n{TEXT // 2} rows of text ask:\n\n{table(asked)}\n"


# --- on the GPU ---


class Call:
    """One call's inputs and outputs on the device; ``launch`` queues it on the current stream."""

    def __init__(self, torch: Any, launcher: Any, shape: kernel.Shape, dtype: str) -> None:
        self.torch, self.launcher, self.shape, self.dtype = torch, launcher, shape, dtype
        kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        self.inputs = draw(torch, shape, kinds[dtype], "cuda")
        empty = {"device": "cuda", "dtype": torch.int64}
        self.outputs = (
            torch.empty(shape.batch, shape.kept, shape.hidden, dtype=kinds[dtype], device="cuda"),
            torch.empty(shape.batch, shape.kept, **empty),
            torch.empty(shape.batch, shape.keep, **empty),
        )
        size = kernel.workspace_bytes(shape)
        self.workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        tensors = (*self.inputs.values(), *self.outputs)
        self.pointers = kernel.Pointers(*(tensor.data_ptr() for tensor in tensors))

    def launch(self) -> None:
        """The kernels."""
        stream = self.torch.cuda.current_stream().cuda_stream
        self.launcher.launch(
            self.shape, self.dtype, SCALE, "mean", "joint", self.pointers,
            self.workspace.data_ptr(), stream,
        )  # fmt: skip

    def unfused(self) -> None:
        """The same, one operator after the other."""
        unfused(self.torch, self.inputs, self.shape.keep)

    def check(self) -> None:
        """SystemExit when what it computes is not the definition."""
        self.launch()
        self.torch.cuda.synchronize()
        query, keys, hidden = (
            self.inputs[name].float().cpu().numpy() for name in ("query", "keys", "hidden")
        )
        vision = self.inputs["vision_index"].cpu().numpy()
        rows, indices, places = (tensor.cpu() for tensor in self.outputs)
        outputs = rows.float().numpy(), indices.numpy(), places.numpy()
        score = scores(query.astype(float), keys.astype(float), vision, hidden.shape[1])
        if found := faults(score, vision, hidden, outputs):
            raise SystemExit("\n".join(["the kernel is not its definition:", *found]))


def graph_us(torch: Any, steps: Sequence[Callable[[], None]], runs: int) -> float:
    """Microseconds of one step: the median over replays of a CUDA graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for step in steps[:2]:
            step()  # what is allocated or compiled once is, before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    took = []
    for number in range(runs + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            took.append(1000 * begin.elapsed_time(end) / len(steps))
    return median(took)


def copy_bandwidth(torch: Any, runs: int) -> float:
    """Bytes read and written a second by a copy from device to device."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2e6 * COPY_BYTES / graph_us(torch, [lambda: target.copy_(source)], runs)


def measure_size(
    torch: Any, launcher: Any, shape: kernel.Shape, dtype: str, bandwidth: float, runs: int
) -> Times:
    """Check and time one size."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(64, 2 + 4 * cache // floor_bytes(shape, dtype))
    calls = [Call(torch, launcher, shape, dtype) for _ in range(count)]
    for call in calls[:3]:
        call.check()
    say(f"n = {shape.vision}, {shape.query}: checked, now timed over {count} sets of inputs")
    return Times(
        shape.vision,
        graph_us(torch, [call.launch for call in calls], runs),
        1e6 * floor_bytes(shape, dtype) / bandwidth,
        graph_us(torch, [call.unfused for call in calls], runs),
    )


def missing() -> str | None:
    """Why it cannot run here; None: it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA GPU"
    try:
        torch.cuda.init()
        torch.empty(1, device="cuda")
        kernel.launcher()
    except VtrError as error:
        return error.message
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=tuple(kernel.DTYPES), default="fp16")
    parser.add_argument("--runs", type=int, default=20, help="replays after the warm-up")
    parser.add_argument("--out", type=Path, default=HERE / "gpu_kernel.md")
    args = parser.parse_args()
    if why := missing():
        print(f"gpu_kernel.py needs a GPU: {why}", file=sys.stderr)
        raise SystemExit(2)
    import torch

    launcher, bandwidth = kernel.launcher(), copy_bandwidth(torch, args.runs)
    options = args.dtype, bandwidth, args.runs
    last, text = (
        [measure_size(torch, launcher, shape_of(n, query=query), *options) for n in TOKENS]
        for query in QUERIES
    )
    gpu = torch.cuda.get_device_name(0)
    facts = gpu, f"CUDA {torch.version.cuda}", args.dtype, f"kernel {kernel.sha256()[:12]}"
    page = f"# The fused cut\n\n{head(*facts)}\n{report(last, text, bandwidth)}"
    args.out.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
