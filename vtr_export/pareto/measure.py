"""Ask every method all questions, and time it in turns with the unpruned model."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Final

import numpy as np

from vtr_export.checkpoint import find_folder, read_model_facts
from vtr_export.cost import prefill_cost, vision_flops
from vtr_export.errors import InputError, VtrError
from vtr_export.families import ModelFacts
from vtr_export.pareto.exports import Entry, Progress, chosen, export_all
from vtr_export.pareto.measured import Point, Refusal, Report
from vtr_export.pareto.methods import SHARES, Method
from vtr_export.process import describe
from vtr_export.runtime.artifact import Answer, Artifact, Request
from vtr_export.runtime.sampling import Options
from vtr_export.schedule import Keep, Resolved
from vtr_export.search.questions.calibration import CalibrationSet, Question
from vtr_export.search.questions.metrics import Metric, get_metric
from vtr_export.search.questions.statistics import image_groups, paired_difference

BATCH: Final = 64  # questions that are asked at once


@dataclass(frozen=True)
class Asked:
    """What every method is asked, and how."""

    questions: Sequence[Question]
    metric: Metric
    threads: int
    repeats: int
    steps: int  # tokens decoded in a timed answer
    max_new_tokens: int

    def request(self, number: int) -> Request:
        """A question as an artifact takes it; behind the last comes the first."""
        question = self.questions[number % len(self.questions)]
        return Request(question.text, list(question.images))


@dataclass
class Side:
    """An opened artifact, and seconds of (first token, one step) a round."""

    artifact: Artifact
    times: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path, threads: int) -> "Side":
        """One whose answers no end token ends."""
        artifact = Artifact.load(folder, threads=threads)
        endless = artifact.manifest.model.model_copy(update={"eos_token_ids": ()})
        manifest = artifact.manifest.model_copy(update={"model": endless})
        return cls(replace(artifact, manifest=manifest))

    def measure(self, request: Request, steps: int) -> None:
        """One answer: pixels to the first token, then ``steps`` more."""
        start = time.perf_counter()
        (answer,) = self.artifact.generate_batch([request], Options(max_new_tokens=steps + 1))
        seconds, spent = time.perf_counter() - start, answer.timings
        if spent.steps != steps:
            raise InputError(
                f"an answer has room for {spent.steps} steps, {steps} are timed",
                hint="time fewer: --steps",
            )
        self.times.append((seconds - spent.preprocess - spent.decode, spent.decode / steps))


def compare(
    model: str | Path,
    questions: str | Path,
    *,
    work: Path,
    methods: Sequence[str] = (),
    schedules: Sequence[Path] = (),
    shares: Sequence[float] = SHARES,
    metric: str = "exact",
    limit: int | None = None,
    max_new_tokens: int = 16,
    threads: int = 1,
    repeats: int = 31,
    steps: int = 16,
    command: str = "",
    progress: Progress | None = None,
) -> Report:
    """Measure ``methods`` (all) at ``shares``, and ``schedules`` as they are, on a checkpoint.

    Artifacts are left in ``work``. What a method refuses is in the report, and so is what an
    interruption left out. Raises InputError, CalibrationError for questions, and what an export
    raises when even the unpruned model is refused.
    """
    say = progress or (lambda _: None)
    known = get_metric(metric)
    if known.text is None:
        raise InputError(f"{metric} looks at no answer", hint="choose exact, vqa or contains")
    asked_of = CalibrationSet.load(questions, limit=limit).questions
    asked = Asked(asked_of, known, threads, repeats, steps, max_new_tokens)
    folder = find_folder(model)
    facts = read_model_facts(folder)
    entries, refusals = export_all(folder, facts, work, chosen(methods), schedules, shares, say)
    points, text = _measure_all(entries, facts, asked, refusals, say)
    return Report(
        model=folder.resolve().name,
        command=command,
        date=time.strftime("%Y-%m-%d"),
        machine=describe(("onnxruntime",)),
        threads=threads,
        questions=len(asked_of),
        metric=metric,
        repeats=repeats,
        steps=steps,
        text_tokens=text,
        points=tuple(points),
        refusals=tuple(refusals),
    )


def _measure_all(
    entries: Sequence[Entry],
    facts: ModelFacts,
    asked: Asked,
    refusals: list[Refusal],
    say: Progress,
) -> tuple[list[Point], float]:
    """A point for each entry; the first, unpruned, is what the others are held against."""
    twin = Side.load(entries[0].artifact, asked.threads)
    points: list[Point] = []
    whole: Scored | None = None
    text = 0.0
    for number, entry in enumerate(entries):
        say(f"{number + 1} of {len(entries)}: {entry}")
        try:
            scored = score(entry.artifact, asked)
            times = race(Side.load(entry.artifact, asked.threads), twin, asked)
            peak = peak_bytes(entry.artifact, asked)
        except VtrError as error:
            if whole is None:
                raise
            refusals.append(Refusal(entry.method.name, entry.asked, error.message))
            continue
        except KeyboardInterrupt:
            if whole is None:
                raise
            left = entries[number:]
            refusals += [Refusal(one.method.name, one.asked, "interrupted") for one in left]
            break
        resolved = entry.schedule.resolve(facts)
        counted = count(resolved, facts, scored.answers)
        if whole is None:
            whole, text = scored, fmean(a.prompt_tokens - a.vision_tokens for a in scored.answers)
        lost = paired_difference(whole.scores, scored.scores, image_groups(asked.questions))
        points.append(
            Point(
                method=entry.method.name,
                phase=_phase(entry.method, resolved),
                asked=entry.asked,
                share=fmean(counted.tokens)
                / (points[0].tokens[0] if points else counted.tokens[0]),
                tokens=counted.tokens,
                accuracy=float(scored.scores.mean()),
                lost=(lost.mean, lost.low, lost.high),
                flops=counted.flops,
                flops_ratio=counted.flops / (points[0].flops if points else counted.flops),
                first_ms=times[0],
                first_ratio=times[1],
                step_ms=times[2],
                step_ratio=times[3],
                peak_bytes=peak,
                schedule=entry.schedule.dump(),
            )
        )
    return points, text


def _phase(method: Method, resolved: Resolved) -> str:
    """Where tokens go; of a schedule that was given, by what it says."""
    if method.phase != "none":
        return method.phase
    return {(True, True): "both", (True, False): "vision", (False, True): "prefill"}.get(
        (bool(resolved.vision), bool(resolved.cuts)), "none"
    )


@dataclass(frozen=True)
class Scored:
    """Every question's score ``[n]`` and answer."""

    scores: np.ndarray
    answers: tuple[Answer, ...]


def score(folder: Path, asked: Asked) -> Scored:
    """Ask all questions, ``BATCH`` at once and as many batches at once as there are cores."""
    artifact, total = Artifact.load(folder, threads=asked.threads), len(asked.questions)
    options = Options(max_new_tokens=asked.max_new_tokens)

    def ask(start: int) -> list[Answer]:
        rows = range(start, min(start + BATCH, total))
        return artifact.generate_batch([asked.request(row) for row in rows], options)

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // asked.threads)) as pool:
        answers = [answer for batch in pool.map(ask, range(0, total, BATCH)) for answer in batch]
    text = asked.metric.text
    assert text is not None, "checked before"
    pairs = zip(answers, asked.questions, strict=True)
    scores = np.array([text(answer.text.strip(), question) for answer, question in pairs])
    return Scored(scores, tuple(answers))


def race(side: Side, twin: Side, asked: Asked) -> tuple[float, float, float, float]:
    """Of ``side``: first token in ms, and by the twin's; one step in ms, and by the twin's.

    A round is one question, asked of both; who begins alternates, and the first round warms up.
    """
    twin.times.clear()
    for number in range(asked.repeats + 1):
        for one in (side, twin)[:: 1 if number % 2 else -1]:
            one.measure(asked.request(number), asked.steps)
    (first, step), (first_whole, step_whole) = (
        zip(*one.times[1:], strict=True) for one in (side, twin)
    )
    return (
        1e3 * median(first),
        median(a / b for a, b in zip(first, first_whole, strict=True)),
        1e3 * median(step),
        median(a / b for a, b in zip(step, step_whole, strict=True)),
    )


@dataclass(frozen=True)
class Counted:
    """Means over questions: tokens that enter each layer, FLOPs to the first token."""

    tokens: tuple[float, ...]
    flops: float


def count(resolved: Resolved, facts: ModelFacts, answers: Sequence[Answer]) -> Counted:
    """From what was really left of each question's image, which may depend on the image."""
    rows, flops = [], []
    for answer in answers:
        vision, text = answer.vision_tokens, answer.prompt_tokens - answer.vision_tokens
        own = _as_kept(replace(resolved, vision=(), tower=None), vision, answer)
        rows.append(own.keep_per_layer(vision))
        encoder = vision_flops(facts, 1, resolved)
        flops.append(encoder + prefill_cost(facts, own, vision, text, "exact"))
    tokens = tuple(fmean(column) for column in zip(*rows, strict=True))
    return Counted(tokens, fmean(flops))


def _as_kept(resolved: Resolved, vision: int, answer: Answer) -> Resolved:
    """With the counts that a threshold left of this image."""
    if resolved.threshold is None:
        return resolved
    pairs = zip(resolved.cuts, answer.kept, strict=True)
    cuts = tuple(replace(cut, keep=Keep(len(kept), vision)) for cut, kept in pairs)
    return replace(resolved, cuts=cuts)


def peak_bytes(folder: Path, asked: Asked) -> int:
    """The most memory of a process that opens the artifact and answers the first question."""
    request = asked.request(0)
    words = {
        "artifact": str(folder),
        "images": [str(image) for image in request.images],
        "prompt": request.prompt,
        "threads": asked.threads,
        "max_new_tokens": asked.max_new_tokens,
    }
    command = [sys.executable, "-m", "vtr_export.pareto.child", json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(
            f"a process of its own could not answer: {done.stderr.strip()[-300:]}",
            where=str(folder),
            hint="vtr run says more",
        )
    return int(done.stdout.splitlines()[-1])
