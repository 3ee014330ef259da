"""An artifact beside its checkpoint: everything that is checked, in order, in this process."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from vtr_export.checkpoint import Checkpoint
from vtr_export.families import read_facts
from vtr_export.frontends.remote import run_config
from vtr_export.manifest import Gate, Manifest, Reduced
from vtr_export.runtime.batch import flagged
from vtr_export.runtime.encoder import encode, left
from vtr_export.runtime.images import ImageInputs
from vtr_export.schedule import Resolved
from vtr_export.verify.case import Case, Question
from vtr_export.verify.compare import compare
from vtr_export.verify.first_layers import build_decoder, first_layers
from vtr_export.verify.gates import BARS, Bars, at_least, at_most
from vtr_export.verify.golden import FOLDER, write_golden
from vtr_export.verify.oracle import Oracle
from vtr_export.verify.pictures import draw_picture
from vtr_export.verify.questions import Asked, ask, question
from vtr_export.verify.scope import layers_of
from vtr_export.verify.sessions import Parts
from vtr_export.verify.whole import WholeOracle

CASES = {"single": ((0,), 16), "batch": ((0, 1), 4)}  # prompts side by side, decode steps


@dataclass(frozen=True)
class Job:
    """What to verify, and how."""

    artifact: Path
    checkpoint: Path
    schedule: Resolved
    dtype: str
    scope: str = "all"
    image: Path | None = None
    prompt: str | None = None
    golden: bool = True
    trusted: bool = False  # to run the checkpoint's own code


@dataclass(frozen=True)
class Findings:
    """What was measured; ``golden`` names the files that were written."""

    gates: tuple[Gate, ...]
    warnings: tuple[str, ...] = ()
    golden: tuple[str, ...] = ()


def check(job: Job) -> Findings:
    """Run every gate; golden vectors are written when a whole model passes them all."""
    checkpoint = Checkpoint.open(job.checkpoint, run_config(job.checkpoint, job.trusted))
    facts = read_facts(checkpoint.config, str(checkpoint.folder / "config.json"))
    manifest = Manifest.load(job.artifact)
    made = checkpoint.files and not checkpoint.code
    source = job.artifact if made else checkpoint.folder  # of transformers' files
    parts, schedule, config = Parts.of(job.artifact, manifest), job.schedule, source
    pad = manifest.model.pad_token_id or 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        image = job.image or draw_picture(folder / "picture.png")
        reduced = manifest.model.reduced
        reduce = None if reduced is None else partial(_left, parts, reduced)
        asked = ask(job.artifact, source, facts, image, job.prompt, reduce)
        questions = [question(name, asked, rows, facts, pad) for name, (rows, _) in CASES.items()]
        if reduced is not None:
            questions = [_encoded(parts, each) for each in questions]
        count = layers_of(job.scope, facts.layers)
        if count is not None:
            schedule = first_layers(schedule, count)
            parts = build_decoder(parts, checkpoint, manifest, schedule, folder)
            config = folder
        kind = Oracle if facts.features == "tokens" else WholeOracle
        oracle = kind(checkpoint.folder, config, schedule, job.dtype, trusted=job.trusted)
        inputs = _inputs_gate(oracle, asked, questions, pad, facts.image_token_id)
        gates = [*asked.gates, inputs]
        cases = _answers(oracle, questions)
        gates += _protected_gates(oracle, questions, BARS[job.dtype])
        del oracle
        gates += compare(parts, cases, BARS[job.dtype])
    if not job.golden or count is not None or not all(gate.passed for gate in gates):
        return Findings(tuple(gates), asked.warnings)
    golden = write_golden(cases, job.artifact / FOLDER)
    missing = [f"golden vectors of {c.question.name} exceed 8 MB" for c in cases[len(golden) :]]
    return Findings(tuple(gates), (*asked.warnings, *missing), golden)


def _answers(oracle: Oracle, questions: Sequence[Question]) -> list[Case]:
    return [
        oracle.answer(each, steps)
        for each, (_, steps) in zip(questions, CASES.values(), strict=True)
    ]


def _left(parts: Parts, reduced: Reduced, images: ImageInputs) -> ImageInputs:
    """Images with the tokens that reductions leave; the graph says how many, where they decide."""
    if reduced.is_static:
        return left(images, reduced)
    return left(images, reduced, encode(parts.open(parts.vision), images.feeds).counts)


def _encoded(parts: Parts, question: Question) -> Question:
    """With the tokens that the vision encoder chose."""
    found = encode(parts.open(parts.vision), question.images)
    rows = found.features.reshape(-1, found.features.shape[-1])
    flags = found.protected
    if flags is not None:
        mask, index = question.attention_mask, question.vision_index
        question = replace(question, protected=flagged(mask, index, flags.astype(np.int64)))
    return replace(question, features=rows)


def _protected_gates(oracle: Oracle, questions: Sequence[Question], bars: Bars) -> list[Gate]:
    """Tokens that the graph protects beside those of the checkpoint, where it tells any."""
    shared = []
    for each in questions:
        if each.protected is None or each.name not in oracle.protected:
            continue
        ours, theirs = each.protected[each.real_vision] != 0, oracle.protected[each.name]
        if ours.shape == theirs.shape:
            shared.append((ours & theirs).sum() / max((ours | theirs).sum(), 1))
        elif bars.difference is not None:  # rounding may merge another number of windows
            shared.append(0.0)
    if not shared:
        return []
    return [at_least("vision_encoder.protected", float(min(shared)), bars.overlap)]


def _inputs_gate(
    oracle: Oracle, asked: Asked, questions: Sequence[Question], pad: int, image: int | None
) -> Gate:
    """The runtime's batches, masks, positions and vision indices beside the reference's."""
    token = -1 if image is None else image
    counts = [
        oracle.differing_inputs(each, [asked.rows[row] for row in rows], pad, token)
        for each, (rows, _) in zip(questions, CASES.values(), strict=True)
    ]
    return at_most("batch.differences", sum(counts), 0)
