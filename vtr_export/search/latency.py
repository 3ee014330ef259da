"""Prefill time on a named backend: measured at uniform keeps, then predicted by a table."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from vtr_export.checkpoint import find_folder, read_model_facts
from vtr_export.errors import InputError
from vtr_export.extras import require
from vtr_export.runtime.artifact import Artifact
from vtr_export.runtime.decoder import Decoder
from vtr_export.runtime.session import Array, Device, import_runtime
from vtr_export.schedule import Schedule
from vtr_export.search.budget import Workload
from vtr_export.search.candidate import Candidate, Score, Space

DEVICES: Final[Mapping[str, Device]] = {"onnxruntime-cpu": "cpu", "onnxruntime-cuda": "cuda"}
POINTS: Final = 8  # uniform keeps that are timed, none and all among them
REPEATS: Final = 9
Progress = Callable[[str], None]
Run = Callable[[], object]


@dataclass(frozen=True)
class LatencyTable:
    """Time of one decoder layer and of one cut by the rows that enter it, on one machine.

    ``layer_ms[i]`` and ``cut_ms[i]`` belong to ``rows[i]``, vision and text tokens of one prompt,
    ascending; times between are linear, and never fall. What a model does outside its layers is
    spread over them, so that ``layers * layer_ms[-1]`` is the unpruned prefill.
    """

    backend: str
    runtime: str
    dtype: str
    threads: int | None
    score: str
    layers: int
    vision_tokens: int
    text_tokens: int
    rows: tuple[int, ...]
    layer_ms: tuple[float, ...]
    cut_ms: tuple[float, ...]
    repeats: int

    def __post_init__(self) -> None:
        fits = len(self.rows) == len(self.layer_ms) == len(self.cut_ms)
        rows = list(self.rows) == sorted(set(self.rows))
        if not (fits and rows and _never_falls(self.layer_ms) and _never_falls(self.cut_ms)):
            raise ValueError(f"no table: {self}")

    @property
    def unpruned_ms(self) -> float:
        """The prefill when nothing is dropped."""
        return self.layers * self.layer_ms[-1]

    def predict_ms(self, candidate: Candidate) -> float:
        """The prefill; a cut that drops nothing is none."""
        rows = np.asarray(candidate.keeps) * self.vision_tokens // candidate.parts
        rows = rows + self.text_tokens
        ranked = rows[:-1][rows[1:] < rows[:-1]]
        layers = np.interp(rows, self.rows, self.layer_ms).sum()
        return float(layers + np.interp(ranked, self.rows, self.cut_ms).sum())

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` reads an equal table from them."""
        lists = {"rows": self.rows, "layer_ms": self.layer_ms, "cut_ms": self.cut_ms}
        return asdict(self) | {name: list(values) for name, values in lists.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "LatencyTable":
        """What ``to_json`` gave."""
        lists = {name: tuple(data[name]) for name in ("rows", "layer_ms", "cut_ms")}
        return cls(**{**data, **lists})


def _never_falls(values: Sequence[float]) -> bool:
    return list(values) == sorted(values) and values[0] >= 0


@dataclass(frozen=True)
class Times:
    """Prefills in ms: ``unpruned`` has no cut; entry i of the others belongs to the i-th keep.

    They keep so much from layer 1 on: ``one_cut`` has that cut alone, ``all_cuts`` ranks before
    every later layer again. Keeps ascend, and the last is everything.
    """

    unpruned: float
    one_cut: tuple[float, ...]
    all_cuts: tuple[float, ...]


def fit(times: Times, layers: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """``layer_ms`` and ``cut_ms`` of a table, one each a keep; ``layers`` at least 2.

    ``all_cuts`` of everything is L - 1 cuts above ``unpruned``; of fewer tokens it is L - 2 narrow
    cuts above ``one_cut``, which is a whole layer, the widest cut and L - 1 narrow layers. Noise is
    smoothed by isotonic regression.
    """
    one, every = np.asarray(times.one_cut), np.asarray(times.all_cuts)
    widest = max((every[-1] - times.unpruned) / (layers - 1), 0.0)
    cuts = np.append((every - one)[:-1] / max(layers - 2, 1), widest)
    whole = times.unpruned / layers
    found = np.append((one[:-1] - whole - widest) / (layers - 1), whole)
    return _monotone(found), _monotone(cuts)


def _monotone(values: Array) -> tuple[float, ...]:
    """The nearest that never falls, from 0 to the last value, which stays."""
    optimize = require("scipy.optimize", "search", "a latency budget")
    smooth = optimize.isotonic_regression(np.clip(values, 0, values[-1])).x
    return tuple(float(value) for value in smooth)


def measure(
    model: str | Path,
    backend: str,
    score: Score,
    workload: Workload,
    *,
    dtype: str = "fp32",
    threads: int | None = None,
    repeats: int = REPEATS,
    progress: Progress | None = None,
) -> LatencyTable:
    """Time a checkpoint's prefill of ``workload``; its graphs are exported for the purpose.

    ``threads`` are ONNX Runtime's. Raises InputError for an unknown backend or a model of one
    layer, UnavailableError where the backend is not here, and whatever an export raises.
    """
    say, space = progress or _silent, _space(model)
    timer = _Timer(model, workload, _device(backend), dtype, threads, say)
    if space.layers < 2 or workload.vision_tokens < 1:
        raise InputError(
            "there is nothing to drop: one layer, or questions without images",
            where=str(model),
            hint="use --budget flops=… with a deeper model and questions about images",
        )
    keeps = _points(space.parts, workload)
    one_cut, all_cuts = (_open(space, score, last) for last in (1, space.layers - 1))
    with timer:
        runs = [timer.run(Schedule.unpruned())]
        runs += timer.tune(one_cut, [[keep] for keep in keeps])
        runs += timer.tune(all_cuts, [[keep] * (space.layers - 1) for keep in keeps])
        unpruned, *ms = race(runs, repeats, say)
    times = Times(unpruned, tuple(ms[: len(keeps)]), tuple(ms[len(keeps) :]))
    layer_ms, cut_ms = fit(times, space.layers)
    return LatencyTable(
        backend=backend,
        runtime=f"onnxruntime {import_runtime(timer.device).__version__}",
        dtype=dtype,
        threads=threads,
        score=str(score),
        layers=space.layers,
        vision_tokens=workload.vision_tokens,
        text_tokens=workload.text_tokens,
        rows=tuple(_rows(keep, space.parts, workload) for keep in keeps),
        layer_ms=layer_ms,
        cut_ms=cut_ms,
        repeats=repeats,
    )


def time_candidate(
    model: str | Path,
    backend: str,
    candidate: Candidate,
    workload: Workload,
    *,
    dtype: str = "fp32",
    threads: int | None = None,
    repeats: int = REPEATS,
    progress: Progress | None = None,
) -> tuple[float, float]:
    """Prefill in ms of a candidate's own graph, and of the unpruned one beside it."""
    say, space = progress or _silent, _space(model)
    timer = _Timer(model, workload, _device(backend), dtype, threads, say)
    schedule = candidate.schedule(space.facts, {"method": "timed"})
    with timer:
        runs = [timer.run(Schedule.unpruned()), timer.run(schedule)]
        unpruned, pruned = race(runs, repeats, say)
    return pruned, unpruned


def race(runs: Sequence[Run], repeats: int, say: Progress) -> list[float]:
    """Median ms of each, run in turns that change direction; the first turn warms up."""
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        say(f"turn {turn} of {repeats}" if turn else "warm up")
        order = range(len(runs))[:: 1 if turn % 2 else -1]
        for number in order:
            start = time.perf_counter()
            runs[number]()
            seconds[number].append(time.perf_counter() - start)
    return [1e3 * median(times[1:]) for times in seconds]


@dataclass
class _Timer(AbstractContextManager["_Timer"]):
    """Graphs of one checkpoint in a temporary folder, each as a call that prefills one prompt."""

    model: str | Path
    workload: Workload
    device: Device
    dtype: str
    threads: int | None
    say: Progress

    def __enter__(self) -> "_Timer":
        self.folder = TemporaryDirectory(prefix="vtr-latency-")
        self.graphs = 0
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()

    def run(self, schedule: Schedule) -> Run:
        """Its prefill."""
        loaded = self._load(schedule, tunable=False)
        return self._prefill(loaded, loaded.model.decoder)

    def tune(self, schedule: Schedule, keeps: Sequence[Sequence[int]]) -> list[Run]:
        """The prefill of one graph at several keeps."""
        loaded = self._load(schedule, tunable=True)
        decoder = loaded.model.decoder
        decoders = [decoder.with_keep(np.array(numbers, np.int64)) for numbers in keeps]
        return [self._prefill(loaded, decoder) for decoder in decoders]

    def _load(self, schedule: Schedule, *, tunable: bool) -> Artifact:
        from vtr_export.exporter import export

        self.graphs += 1
        self.say(f"export graph {self.graphs} to time")
        out = Path(self.folder.name) / str(self.graphs)
        export(
            schedule,
            self.model,
            out,
            dtype=self.dtype,
            weights="link",
            verify="none",
            tunable=tunable,
        )
        return Artifact.load(out, device=self.device, threads=self.threads)

    def _prefill(self, loaded: Artifact, decoder: Decoder) -> Run:
        """Half of the text, the vision tokens, the other half; embeddings are noise."""
        vision, text = self.workload.vision_tokens, self.workload.text_tokens
        shape = 1, vision + text, loaded.manifest.model.hidden
        noise = np.random.default_rng(0).standard_normal(shape, np.float32)
        if decoder.embedding_dtype != "bfloat16":
            noise = noise.astype(decoder.embedding_dtype)
        mask = np.ones(shape[:2], np.int64)
        index = np.arange(text // 2, text // 2 + vision, dtype=np.int64)[None]
        return lambda: decoder(decoder.empty(1), noise, mask, index)


def open_schedule(space: Space, score: Score) -> Schedule:
    """A cut before every layer but the first: exported ``tunable``, it is any candidate."""
    return _open(space, score, space.layers - 1)


def _open(space: Space, score: Score, last: int) -> Schedule:
    """Cuts before the layers from 1 to ``last``, which count in the space's parts."""
    keep = space.facts.tokens_per_image or f"{space.parts - 1}%"  # 100 % has no parts to count in
    stages = tuple({"before_layer": layer, "keep": keep} for layer in range(1, last + 1))
    prefill = {"score": score.to_data(), "stages": stages}
    return Schedule.from_data({"version": 1, "prefill": prefill, "origin": {"method": "open"}})


def _points(parts: int, workload: Workload) -> list[int]:
    """Keeps from none to all, each of another number of tokens."""
    even = sorted({parts * i // (POINTS - 1) for i in range(POINTS)}, reverse=True)
    by_rows = {_rows(keep, parts, workload): keep for keep in even}
    return sorted(by_rows.values())


def _rows(keep: int, parts: int, workload: Workload) -> int:
    return keep * workload.vision_tokens // parts + workload.text_tokens


def _space(model: str | Path) -> Space:
    folder = find_folder(model)
    return Space(read_model_facts(folder))


def _device(backend: str) -> Device:
    """Where it runs, if it is here."""
    if backend not in DEVICES:
        raise InputError(
            f"no backend {backend!r} to time on", hint=f"choose one of: {', '.join(DEVICES)}"
        )
    import_runtime(DEVICES[backend])
    return DEVICES[backend]


def _silent(_: str) -> None:
    """Say nothing."""
