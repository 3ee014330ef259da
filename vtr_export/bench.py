"""Time an artifact or an engine beside its unpruned twin, and say what was predicted."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from vtr_export.checkpoint import read_model_facts
from vtr_export.errors import InputError
from vtr_export.families import ModelFacts
from vtr_export.plan import PlanReport, plan
from vtr_export.published import kind_of
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
    """Medians of interleaved runs of one prompt beside what ``vtr plan`` predicts of them.

    Times in milliseconds; ``decode`` is per token, ``first_token`` the vision encoder and the
    prefill. ``predicted_*_ms`` are the roofline's of ``predicted_for``, ``predicted_*_speedup`` of
    the prefill the ratio of exact FLOPs, of the others the roofline's.
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
    first_token_ms: float
    first_token_ms_unpruned: float
    predicted_first_token_ms: float
    predicted_first_token_ms_unpruned: float
    decode_ms: float
    decode_ms_unpruned: float
    decode_speedup: float
    predicted_decode_ms: float
    predicted_decode_ms_unpruned: float
    predicted_decode_speedup: float
    predicted_for: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"vision_tokens_per_layer": list(self.vision_tokens_per_layer)}

    def rows(self) -> list[tuple[str, ...]]:
        """Lines of (what, unpruned, pruned, speed-up), each with what was predicted."""
        prefill = self.prefill_ms_unpruned, None, self.prefill_ms, None
        first = (
            self.first_token_ms_unpruned,
            self.predicted_first_token_ms_unpruned,
            self.first_token_ms,
            self.predicted_first_token_ms,
        )
        decode = (
            self.decode_ms_unpruned,
            self.predicted_decode_ms_unpruned,
            self.decode_ms,
            self.predicted_decode_ms,
        )
        return [
            ("", "unpruned", "predicted", "pruned", "predicted", "speed-up", "predicted"),
            (
                "prefill",
                *map(_ms, prefill),
                _ratio(prefill),
                f"{self.predicted_prefill_speedup:.3f}",
            ),
            ("first token", *map(_ms, first), _ratio(first), _ratio(first[1:])),
            ("each next token", *map(_ms, decode), _ratio(decode), _ratio(decode[1:])),
        ]


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4g} ms"


def _ratio(times: Sequence[float | None]) -> str:
    """The first by the third."""
    whole, _, pruned, *_ = times
    return "" if not whole or not pruned else f"{whole / pruned:.3f}"


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
    device: str | None = None,
    predict: str = "cpu",
    progress: Progress | None = None,
) -> BenchReport:
    """Time ``artifact`` and its twin in turns: prefill of random embeddings, then decode steps.

    The twin is ``against`` (an artifact or engine of the same model), or else the artifact's own
    graph given no vision index, which drops nothing; an engine's kernels were chosen for what its
    schedule keeps, so one built without cuts is the fairer twin. ``device`` None: the GPU as soon
    as one of them is an engine, else the CPU. ``predict`` names the machine of ``vtr plan`` whose
    times stand beside. Raises InputError for an option, ArtifactError or EngineError for a damaged
    folder, UnavailableError for a device that is not there.
    """
    _check(repeats, new_tokens, text_tokens)
    say = progress or (lambda _: None)
    folders = [artifact] if against is None else [artifact, against]
    if device is None and "engine" in [kind_of(folder) for folder in folders]:
        device = "cuda"
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
        device=predict,
        weights=loaded.manifest.dtype,
    )
    work = _workload(facts, loaded.model.decoder, predicted)
    twin = Side(loaded.model.decoder, replace(work, vision_index=work.vision_index[:, :0]), [])
    if against is not None:
        other = Artifact.load(against, device=device, threads=threads)
        _check_same_model(facts, _facts(other), other.folder)
        twin = Side(other.model.decoder, work, [])
    sides = Side(loaded.model.decoder, work, []), twin
    _race(sides, repeats, say)
    say("vision encoder")
    return BenchReport(
        artifact=str(loaded.folder),
        against=SAME_GRAPH if against is None else str(against),
        device=loaded.device,
        threads=threads,
        dtype=loaded.manifest.dtype,
        repeats=repeats,
        **_times(*sides, _encoder_ms(loaded, facts, images, repeats)),
        **_predictions(predicted),
    )


def _race(sides: tuple[Side, Side], repeats: int, say: Progress) -> None:
    """In turns, each beginning as often as the other; the first run of each warms up."""
    for number in range(repeats + 1):
        say(f"run {number} of {repeats}" if number else "warm up")
        for side in sides[:: 1 if number % 2 else -1]:
            side.measure()


def _times(side: Side, twin: Side, encoder_ms: float | None) -> dict[str, Any]:
    (prefill, decode), (prefill_whole, decode_whole) = side.medians_ms(), twin.medians_ms()
    return {
        "vision_encoder_ms": encoder_ms,
        "prefill_ms": prefill,
        "prefill_ms_unpruned": prefill_whole,
        "prefill_speedup": prefill_whole / prefill,
        "first_token_ms": prefill + (encoder_ms or 0.0),
        "first_token_ms_unpruned": prefill_whole + (encoder_ms or 0.0),
        "decode_ms": decode,
        "decode_ms_unpruned": decode_whole,
        "decode_speedup": decode_whole / decode,
    }


def _predictions(predicted: PlanReport) -> dict[str, Any]:
    assert predicted.tpot_ms is not None
    assert predicted.tpot_ms_unpruned is not None
    return {
        "vision_tokens": predicted.vision_tokens,
        "text_tokens": predicted.text_tokens,
        "new_tokens": predicted.new_tokens,
        "vision_tokens_per_layer": predicted.vision_tokens_per_layer,
        "predicted_prefill_speedup": predicted.ideal_speedup,
        "predicted_first_token_ms": predicted.ttft_ms,
        "predicted_first_token_ms_unpruned": predicted.ttft_ms_unpruned,
        "predicted_decode_ms": predicted.tpot_ms,
        "predicted_decode_ms_unpruned": predicted.tpot_ms_unpruned,
        "predicted_decode_speedup": predicted.tpot_ms_unpruned / predicted.tpot_ms,
        "predicted_for": predicted.device,
    }


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
    return read_model_facts(artifact.folder)


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
    """Median of encoding blank images; None without any, and where images keep their size."""
    vision = facts.vision
    if vision is None or images == 0 or vision.image_size is None:
        return None
    shape = (images, vision.channels, vision.image_size, vision.image_size)
    pixels, times = np.zeros(shape, np.float32), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        artifact.model.encode({"pixel_values": pixels})
        times.append(time.perf_counter() - start)
    return 1e3 * median(times[1:])
