"""Time an artifact beside its unpruned twin, and say what was predicted."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from vtr_export.checkpoint import read_config
from vtr_export.errors import InputError
from vtr_export.families import ModelFacts, read_facts
from vtr_export.plan import PlanReport, plan
from vtr_export.runtime.artifact import Artifact
from vtr_export.runtime.batch import Ints
from vtr_export.runtime.decoder import Cache, Decoder
from vtr_export.runtime.session import Array
from vtr_export.schedule import Schedule

MIN_REPEATS = 7
SAME_GRAPH = "the same graph given no vision_index: it drops nothing"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class BenchReport:
    """Medians of interleaved runs, one prompt at a time; ``predicted_*`` are counted, not timed.

    ``predicted_prefill_speedup`` is the exact FLOPs' ratio, ``predicted_decode_speedup`` the
    roofline's on the planner's ``cpu``. Times in milliseconds; ``decode`` is per token.
    """

    artifact: str
    against: str
    device: str
    threads: int | None
    dtype: str
    vision_tokens: int
    text_tokens: int
    new_tokens: int
    repeats: int
    vision_tokens_per_layer: tuple[int, ...]
    vision_encoder_ms: float | None
    prefill_ms: float
    prefill_ms_unpruned: float
    prefill_speedup: float
    predicted_prefill_speedup: float
    decode_ms: float
    decode_ms_unpruned: float
    decode_speedup: float
    predicted_decode_speedup: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"vision_tokens_per_layer": list(self.vision_tokens_per_layer)}

    def rows(self) -> list[tuple[str, ...]]:
        """Lines of (what, unpruned, pruned, speed-up, predicted)."""
        rows: list[tuple[str, ...]] = [("", "unpruned", "pruned", "speed-up", "predicted")]
        if self.vision_encoder_ms is not None:
            whole = f"{self.vision_encoder_ms:.1f} ms"
            rows.append(("vision encoder", whole, whole, "1.000", "1.000"))
        return [
            *rows,
            (
                "prefill",
                f"{self.prefill_ms_unpruned:.1f} ms",
                f"{self.prefill_ms:.1f} ms",
                f"{self.prefill_speedup:.3f}",
                f"{self.predicted_prefill_speedup:.3f}",
            ),
            (
                "each next token",
                f"{self.decode_ms_unpruned:.2f} ms",
                f"{self.decode_ms:.2f} ms",
                f"{self.decode_speedup:.3f}",
                f"{self.predicted_decode_speedup:.3f}",
            ),
        ]


@dataclass(frozen=True)
class Workload:
    """One prompt: embeddings [1,S,D], where its vision tokens are, and how many steps follow."""

    embeddings: Array
    mask: Ints
    vision_index: Ints
    steps: int


@dataclass(frozen=True)
class Side:
    """A decoder and the vision index it is given; ``times`` are (prefill, one decode step) in s."""

    decoder: Decoder
    work: Workload
    times: list[tuple[float, float]]

    def measure(self) -> None:
        """One prefill and the decode steps behind it."""
        start = time.perf_counter()
        step = self._call(self.decoder.empty(1), self.work.embeddings, self.work.vision_index)
        prefilled = time.perf_counter()
        for _ in range(self.work.steps):
            step = self._call(step, self.work.embeddings[:, -1:], self.work.vision_index[:, :0])
        decoded = time.perf_counter()
        self.times.append((prefilled - start, (decoded - prefilled) / self.work.steps))

    def _call(self, cache: Cache, embeddings: Array, vision_index: Ints) -> Cache:
        mask = self.work.mask[:, : embeddings.shape[1]]
        return self.decoder(cache, embeddings, mask, vision_index).cache

    def medians_ms(self) -> tuple[float, float]:
        """Prefill and one decode step, warm-up left out."""
        prefill, decode = zip(*self.times[1:], strict=True)
        return 1e3 * median(prefill), 1e3 * median(decode)


def bench(
    artifact: str | Path,
    *,
    against: str | Path | None = None,
    images: int = 1,
    vision_tokens: int | None = None,
    text_tokens: int = 64,
    new_tokens: int = 16,
    repeats: int = MIN_REPEATS,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> BenchReport:
    """Time ``artifact`` and its twin in turns: prefill of random embeddings, then decode steps.

    The twin is ``against`` (an artifact of the same model), or else the artifact's own graph given
    no vision index, which drops nothing. Raises InputError for an option, ArtifactError for a
    damaged artifact, UnavailableError for a device that is not there.
    """
    _check(repeats, new_tokens, text_tokens)
    say = progress or (lambda _: None)
    say("open the artifact")
    loaded = Artifact.load(artifact, device=device, threads=threads)
    facts = _facts(loaded)
    predicted = plan(
        Schedule.parse(loaded.manifest.schedule.text, str(loaded.folder / "schedule.yaml")),
        facts,
        text_tokens=text_tokens,
        images=images,
        vision_tokens=vision_tokens,
        new_tokens=new_tokens,
        device="cpu",
        weights=loaded.manifest.dtype,
    )
    decoder = loaded.model.decoder
    work = _workload(facts, decoder, predicted)
    twin = Side(decoder, replace(work, vision_index=work.vision_index[:, :0]), [])
    if against is not None:
        other = Artifact.load(against, device=device, threads=threads)
        _check_same_model(facts, _facts(other), other.folder)
        twin = Side(other.model.decoder, work, [])
    sides = Side(decoder, work, []), twin
    for number in range(repeats + 1):
        say(f"run {number} of {repeats}" if number else "warm up")
        for side in sides[:: 1 if number % 2 else -1]:
            side.measure()
    say("vision encoder")
    (prefill, decode), (prefill_whole, decode_whole) = (side.medians_ms() for side in sides)
    assert predicted.tpot_ms is not None
    assert predicted.tpot_ms_unpruned is not None
    return BenchReport(
        artifact=str(loaded.folder),
        against=SAME_GRAPH if against is None else str(against),
        device=device,
        threads=threads,
        dtype=loaded.manifest.dtype,
        vision_tokens=predicted.vision_tokens,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        vision_tokens_per_layer=predicted.vision_tokens_per_layer,
        vision_encoder_ms=_encoder_ms(loaded, facts, images, repeats),
        prefill_ms=prefill,
        prefill_ms_unpruned=prefill_whole,
        prefill_speedup=prefill_whole / prefill,
        predicted_prefill_speedup=predicted.ideal_speedup,
        decode_ms=decode,
        decode_ms_unpruned=decode_whole,
        decode_speedup=decode_whole / decode,
        predicted_decode_speedup=predicted.tpot_ms_unpruned / predicted.tpot_ms,
    )


def _check(repeats: int, new_tokens: int, text_tokens: int) -> None:
    if repeats < MIN_REPEATS:
        raise InputError(f"repeats is {repeats}", hint=f"a median needs at least {MIN_REPEATS}")
    for name, value in {"new_tokens": new_tokens, "text_tokens": text_tokens}.items():
        if value < 1:
            raise InputError(f"{name} is {value}", hint="give at least 1")


def _check_same_model(facts: ModelFacts, other: ModelFacts, where: Path) -> None:
    if replace(other, dtype=facts.dtype) != facts:
        raise InputError(
            "--against is an artifact of another model",
            where=str(where),
            hint="export the same checkpoint with another schedule",
        )


def _facts(artifact: Artifact) -> ModelFacts:
    return read_facts(read_config(artifact.folder)[0], str(artifact.folder / "config.json"))


def _workload(facts: ModelFacts, decoder: Decoder, predicted: PlanReport) -> Workload:
    """Half of the text, the vision tokens, the other half; embeddings are noise."""
    vision, first = predicted.vision_tokens, predicted.text_tokens // 2
    length, dtype = vision + predicted.text_tokens, decoder.embedding_dtype
    noise = np.random.default_rng(0).standard_normal((1, length, facts.hidden), np.float32)
    return Workload(
        embeddings=noise if dtype == "bfloat16" else noise.astype(dtype),
        mask=np.ones((1, length), np.int64),
        vision_index=np.arange(first, first + vision, dtype=np.int64)[None],
        steps=predicted.new_tokens,
    )


def _encoder_ms(artifact: Artifact, facts: ModelFacts, images: int, repeats: int) -> float | None:
    """Median of encoding blank images; None without any."""
    vision = facts.vision
    if vision is None or images == 0:
        return None
    shape = (images, vision.channels, vision.image_size, vision.image_size)
    pixels, times = np.zeros(shape, np.float32), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        artifact.model.encode(pixels)
        times.append(time.perf_counter() - start)
    return 1e3 * median(times[1:])
