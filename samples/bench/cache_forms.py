"""Forms of the key-value cache in TensorRT: what builds, with which kernels, moving how many bytes.

python samples/bench/cache_forms.py --write

Builds a small decoder with two cuts for SM 8.6 and 12.0 with both profiles, in every form of
``cache_graphs.py``; no GPU is needed and nothing is executed. A plan comes only with a fused
attention, for nothing allows another; the kernels' names in the plan say so again. *Scratch* is
the device memory that the plan wants beside weights, inputs and outputs: a copy of a cache shows
in it. Bytes are computed from the form, for the shape of LLaVA-1.5-7B.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measure import HERE, MIB, child, head, peak_rss_bytes, say, table
from models import SHAPES, Shape

from vtr_export.backends.tensorrt.library import environment, load
from vtr_export.schedule import Cut, Keep, Resolved

TARGET, SMS, BATCH = "tensorrt-rtx", (86, 120), (1, 1, 2)
CAPACITY = 4096
ROOMS = (1600, 4096)  # what `vtr build` makes room for unless told otherwise; the model's context
GB = 10**9
ELEMENT_BYTES = 2
VISION_TOKENS = 576
LENGTHS = (700, 2048, 4096)
PROMPTS = "static, window of prompts"
REPORT = HERE / "cache_forms.md"
FUSED = re.compile(rb"\b(_ge[mv][mv]_mha)\w*_(0x[0-9a-f]{32})")
SCRATCH = re.compile(r"^Layer: .*?(\[profile 1\])? Host Persistent.* Scratch Memory: (\d+) bytes")


@dataclass(frozen=True)
class Lengths:
    """Columns of one layer: ``past`` before the call, ``new`` of it, ``capacity`` if static."""

    past: int
    new: int
    capacity: int

    @property
    def total(self) -> int:
        """What attention may see."""
        return self.past + self.new


def rows_moved(form: Any, at: Lengths) -> int:
    """Rows of keys or of values that one call reads and writes in one layer, for one prompt.

    A kernel reads and writes device memory once. Concat reads the past and writes all; unscaled
    queries mean that keys are written again, scaled; a window is a copy. Attention reads what it
    is given, whatever the mask hides.
    """
    if not form.is_static:
        scaled_keys = 0 if form.scaled else at.total
        return 2 * at.past + 2 * at.total + scaled_keys + 2 * at.total
    if form.window == "always" or (form.window == "prompts" and at.new > 1):
        return 2 * at.new + 2 * (at.total + at.total) + 2 * at.total
    return 2 * at.new + 2 * at.capacity


def bytes_moved(form: Any, shape: Shape, layers: Iterable[Lengths]) -> int:
    """The same in bytes, over all layers."""
    row_bytes = shape.kv_heads * (shape.hidden // shape.heads) * ELEMENT_BYTES
    return row_bytes * sum(rows_moved(form, at) for at in layers)


def bytes_held(form: Any, shape: Shape, layers: Iterable[Lengths]) -> int:
    """The cache of one prompt: what goes in, and what comes out where that is another tensor."""
    row_bytes = shape.kv_heads * (shape.hidden // shape.heads) * ELEMENT_BYTES
    return row_bytes * sum(
        2 * at.capacity if form.is_static else 2 * (at.past + at.total) for at in layers
    )


def weight_bytes(shape: Shape) -> int:
    """Decoder and head: what a generation step reads beside the cache."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    layer = 2 * shape.hidden * (shape.hidden + kv) + 3 * shape.hidden * shape.intermediate
    return ELEMENT_BYTES * (shape.layers * layer + shape.hidden * shape.vocab)


def schedules(layers: int) -> dict[str, Resolved]:
    """What is compared, for one image."""
    half, quarter = layers // 2, layers // 4

    def cut(keeps: Mapping[int, int]) -> Resolved:
        cuts = (Cut(layer, Keep(keep, VISION_TOKENS)) for layer, keep in keeps.items())
        return Resolved(layers, VISION_TOKENS, tuple(cuts))

    pyramid = {quarter: VISION_TOKENS // 2, half: VISION_TOKENS // 4,
               half + quarter: VISION_TOKENS // 8}  # fmt: skip
    return {"unpruned": cut({}), "FastV(2, 50%)": cut({2: VISION_TOKENS // 2}),
            "pyramid(50%)": cut(pyramid)}  # fmt: skip


def step(schedule: Resolved, columns: int, capacity: int | None = None) -> list[Lengths]:
    """A generation step behind ``columns`` unpruned ones; capacity None: just enough."""
    dropped = (VISION_TOKENS - keep for keep in schedule.keep_per_layer(VISION_TOKENS))
    return [Lengths(columns - 1 - n, 1, capacity or columns - n) for n in dropped]


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--tiny", action="store_true", help="a toy model: does it still run")
    options.add_argument("--write", action="store_true", help=f"write {REPORT.name}")
    options.add_argument("--build", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.build is not None:
        print(json.dumps(build(*args.build)))
        return
    text = report(args.tiny)
    print(text)
    if args.write:
        REPORT.write_text(f"# Forms of the cache\n\n{text}\n", encoding="utf-8")


def report(tiny: bool) -> str:
    """Everything, as Markdown."""
    version = load(TARGET).version
    facts = f"{TARGET} {version}", "SM 8.6 and 12.0", "built without a GPU, nothing executed"
    parts = [head(*facts), "## What builds\n", table(list(_builds(tiny))), "", NOTES]
    for name, shape in _models():
        weights = f"{weight_bytes(shape) / GB:.1f} GB of weights"
        parts += [f"\n## Bytes of a generation step: {name}\n",
                  f"One prompt, {weights} in fp16; b prompts move b times as much cache. Columns: "
                  "of the unpruned sequence, 576 of them vision. *Full*: no longer than what is in "
                  "it. A static cache is read whole here, whatever the mask hides: whether kernels "
                  "pass over hidden tiles was not seen.\n"]  # fmt: skip
        parts.append(table(list(_steps(shape))))
    parts += ["\n## Prefill of one image and 124 tokens of text: 7 B\n"]
    parts.append(table(list(_prefills(SHAPES["llava-7b"]))))
    return "\n".join(parts)


NOTES = """\
- *Hides pads*: left padding can be said. Lengths count from the first column on.
- Every form has a length of its own in each stage, and continues a prompt; of `lower_right`, in \
the forms with lengths, its documentation says so.
- *Fused kernels*, by name in the plan: of prompts (`gemm`) and of single tokens (`gemv`). The \
last row shows a prompt without: other kernels, and n x n scores in the scratch.
- *In place*: `KV_CACHE_UPDATE` layers, whose output lies where their input does.
- *Scratch*: device memory beside weights, inputs and outputs, for the largest call of a profile. \
*Copies*: how often the keys (or values) of one layer fit into that of generation, 32 MiB each. \
A step makes these copies in every layer, one layer after another. Keys \
that are scaled behind Concat are copied in fp16 only; the bytes below are those of fp16.
- Lengths beside a mask change nothing: the fused kernels have the same hashes as without."""


def _models() -> list[tuple[str, Shape]]:
    whole = SHAPES["llava-7b"]
    return [("7 B", whole), ("7 B with 8 key-value heads", replace(whole, kv_heads=8))]


def _builds(tiny: bool) -> Iterable[Sequence[object]]:
    from cache_graphs import DECOMPOSED, FORMS, Toy

    yield ("form", "dtype", "hides pads", "fused kernels", "in place", "scratch, context",
           "generation", "copies", "plan", "seconds", "peak RSS")  # fmt: skip
    cases = [(form, dtype) for dtype in ("float16", "bfloat16") for form in FORMS]
    cases += [(FORMS[0], "float"), (DECOMPOSED, "float")]
    toy = Toy() if tiny else Toy(hidden=512, heads=16, kv_heads=16, width=128, tokens=576)
    for form, dtype in cases[:2] if tiny else cases:
        say(f"build {form.name}, {dtype}")
        one = build_apart(form, dtype, toy, 256 if tiny else CAPACITY)
        shown = (form.name, dtype, "yes" if form.left_padding else "no")
        if not one["built"]:
            yield (*shown, f"no plan: {one['why']}", *[""] * 7)
            continue
        context, generation = (f"{value / MIB:.1f} MiB" for value in one["scratch"])
        yield (*shown, ", ".join(one["kernels"]), one["in_place"] or "", context, generation,
               one["copies"]["generation"], f"{one['plan_bytes'] / MIB:.1f} MiB",
               f"{one['seconds']:.1f}", f"{one['peak_rss_bytes'] / MIB:.0f} MiB")  # fmt: skip


def _steps(shape: Shape) -> Iterable[Sequence[object]]:
    from cache_graphs import FORMS

    concat, static = FORMS[0], next(form for form in FORMS if form.name == PROMPTS)
    weights = weight_bytes(shape)
    yield ("schedule", "columns", concat.name, FORMS[1].name, "static, full",
           *(f"static, {room}" for room in ROOMS), "held by concat",
           *(f"by static, {room}" for room in ROOMS))  # fmt: skip
    for name, schedule in schedules(shape.layers).items():
        for columns in LENGTHS:
            full = step(schedule, columns)
            wide = [step(schedule, columns, room) if room >= columns else [] for room in ROOMS]
            moved = [bytes_moved(form, shape, full) for form in (concat, FORMS[1], static)]
            moved += [bytes_moved(static, shape, lengths) for lengths in wide]
            held = [bytes_held(concat, shape, full)]
            held += [bytes_held(static, shape, lengths) for lengths in wide]
            yield (name, columns, *(_share(size, weights) for size in moved),
                   *(f"{size / GB:.2f} GB" if size else "" for size in held))  # fmt: skip


def _share(size: int, weights: int) -> str:
    return f"{size / GB:.2f} GB, {size / weights:.1%}" if size else ""


def _prefills(shape: Shape) -> Iterable[Sequence[object]]:
    from cache_graphs import FORMS

    static, window = (form for form in FORMS if form.name in ("static", PROMPTS))
    yield "form", "cache moved, of weights", "attention's FLOPs", "of all FLOPs"
    tokens, weights = LENGTHS[0], weight_bytes(shape)
    products = 2 * tokens * (weights // ELEMENT_BYTES)
    cases = [(form, tokens) for form in (FORMS[0], FORMS[1], window)]
    for form, room in [*cases, *((static, room) for room in (tokens, *ROOMS))]:
        moved = bytes_moved(form, shape, [Lengths(0, tokens, room)] * shape.layers)
        flops = 4 * tokens * room * shape.hidden * shape.layers
        name = f"{form.name}, {room}" if form is static else form.name
        yield (name, _share(moved, weights), f"{flops / 1e12:.2f} T",
               f"{flops / (flops + products):.1%}")  # fmt: skip


def build_apart(form: Any, dtype: str, toy: Any, capacity: int) -> dict[str, Any]:
    """What came of building ``toy``, a ``cache_graphs.Toy``, in a process of its own."""
    import onnx_ir as ir
    from cache_graphs import DTYPES, decoder, rewritten

    model = rewritten(decoder(toy, dtype), form, capacity)
    with tempfile.TemporaryDirectory() as folder:
        graph, job = Path(folder) / "decoder.onnx", Path(folder) / "profiles.json"
        graph.write_bytes(ir.to_proto(model).SerializeToString())
        job.write_text(json.dumps(profiles(model, toy.tokens, capacity)))
        variables = environment(Path(folder))
        path = f"LD_LIBRARY_PATH={variables.get('LD_LIBRARY_PATH', '')}"
        found = child("env", path, sys.executable, __file__, "--build", graph, job).report
    cache_bytes = BATCH[2] * capacity * toy.kv_heads * toy.width * DTYPES[dtype].itemsize
    copies = [size // cache_bytes for size in found.get("scratch", ())]
    return {**found, "copies": dict(zip(("context", "generation"), copies, strict=False))}


def profiles(model: Any, vision: int, capacity: int) -> list[dict[str, list[list[int]]]]:
    """Bounds (least, best, most) of every input: context, then generation."""
    prompt = min(2 * vision, capacity // 2)
    kinds: list[dict[str, tuple[int, int, int]]] = [
        {"sequence": (1, prompt, prompt), "vision": (0, vision, vision),
         "past": (0, 0, capacity - prompt)},
        {"sequence": (1, 1, 1), "vision": (0, 0, 0), "past": (1, prompt, capacity - 1)},
    ]  # fmt: skip
    for kind in kinds:
        pairs = zip(kind["past"], kind["sequence"], strict=True)
        least, best, most = (past + new for past, new in pairs)
        kind |= {"batch": BATCH, "total": (least, best, most)}
    return [{value.name: _bounds(value.shape, kind) for value in model.graph.inputs}
            for kind in kinds]  # fmt: skip


def _bounds(shape: Any, kind: Mapping[str, tuple[int, int, int]]) -> list[list[int]]:
    dims = [(dim,) * 3 if isinstance(dim, int) else kind[str(dim.value).partition("_")[0]]
            for dim in shape]  # fmt: skip
    return [list(bound) for bound in zip(*dims, strict=True)]


def build(graph: Path, job: Path) -> dict[str, Any]:
    """Parse and build in this process."""
    start, trt = time.perf_counter(), load(TARGET).trt
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph.read_bytes()) or not network.num_outputs:
        return {"built": False, "why": log.why()}
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(SMS)
    for index, sm in enumerate(SMS):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    for bounds in json.loads(job.read_text()):
        profile = builder.create_optimization_profile()
        for name, shapes in bounds.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"built": False, "why": log.why()}
    layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    kernels = set(FUSED.findall(bytes(memoryview(plan))))
    return {
        "built": True,
        "kernels": sorted({name.decode() for name, _ in kernels}),
        "hashes": sorted(digest.decode() for _, digest in kernels),
        "attentions": layers["ATTENTION_INPUT"],
        "in_place": layers["KV_CACHE_UPDATE"],
        "scratch": [max(log.scratch[0], default=0), max(log.scratch[1], default=0)],
        "plan_bytes": plan.nbytes,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Keeps errors, and the scratch memory of each profile's parts."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.scratch: tuple[list[int], list[int]] = [], []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            if (found := SCRATCH.match(message)) is not None:
                self.scratch[bool(found[1])].append(int(found[2]))

        def why(self) -> str:
            said = " ".join(self.errors) or "no reason given"
            told = re.search(r"[^.]*not supported[^.]*", said)
            return (told[0] if told is not None else said).strip()

    return Log()


if __name__ == "__main__":
    main()
