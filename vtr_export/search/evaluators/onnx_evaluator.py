"""Evaluations on a tunable artifact, or an engine built from one: without torch."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np

from vtr_export.errors import ArtifactError, InputError
from vtr_export.extras import require
from vtr_export.manifest import Manifest
from vtr_export.published import kind_of
from vtr_export.runtime.artifact import Artifact
from vtr_export.runtime.batch import Ints
from vtr_export.runtime.model import Model
from vtr_export.runtime.processor import Processor
from vtr_export.runtime.session import Array
from vtr_export.schedule import Schedule
from vtr_export.search.candidate import Candidate, Score, Space
from vtr_export.search.evaluator import Floats, Outcome, Shard, Unpruned
from vtr_export.search.evaluators.prompts import (
    SHARD,
    Prompts,
    divergence,
    metric_of,
    metrics_by_drafts,
)
from vtr_export.search.evaluators.work import Width, call_flops, step_flops
from vtr_export.search.questions.calibration import Question
from vtr_export.search.questions.metrics import Metric

_AS_SEARCHED: Final = {"rank": "joint", "positions": "original", "drop_point": "between"}
_RANKED_AND_DROPPED: Final = {
    "rule": "attention",
    "threshold": None,
    "protect": "none",
    "by": "drop",
}


@dataclass(frozen=True)
class _Draft:
    """What the artifact answers to one question when nothing is dropped, greedily."""

    tokens: tuple[int, ...]  # with the end token, if one ended it
    metric: float
    log_probs: Floats = field(repr=False)  # [tokens, vocab]

    @property
    def margin(self) -> float:
        """Least gap between the two best logits on the way."""
        best = np.partition(self.log_probs, -2, axis=1)[:, -2:]
        return float((best[:, 1] - best[:, 0]).min())


@dataclass(frozen=True)
class _Said:
    """One batch's best tokens ``[B, T]``, and what they are the best of ``[B, T, vocab]``."""

    tokens: Ints
    logits: Array
    decoder_flops: int


class OnnxEvaluator:
    """An artifact that was exported ``--tunable`` with a cut before every layer but the first.

    Nothing is held between candidates but drafts and image features: each pays for all layers.
    ``threads`` are ONNX Runtime's (None: ``OMP_NUM_THREADS``, else all cores). ArtifactError where
    the artifact cannot be searched on.
    """

    def __init__(
        self,
        artifact: Path,
        blocks: Sequence[Sequence[Question]],
        metric: Metric,
        *,
        device: str | None = None,
        threads: int | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        self.space = space_of(artifact)  # refused before anything is loaded
        threads = threads or _threads(artifact)
        self.artifact = Artifact.load(artifact, device=device, threads=threads)
        self.facts, self.prompts = self.space.facts, Prompts(artifact)
        self.blocks, self.metric, self.max_new_tokens = blocks, metric, max_new_tokens
        self._drafts: dict[int, list[_Draft]] = {}
        self._features: dict[tuple[Path, str], Array] = {}  # image, what is read → [1, tokens, D]

    def fingerprint(self) -> Mapping[str, str]:
        """Artifact, device, and how long answers may be."""
        return describe(self.artifact.folder, self.artifact.device, self.max_new_tokens)

    def unpruned(self, block: int) -> Unpruned:
        """Answer greedily; the answers become the drafts."""
        questions, flops, drafts = self.blocks[block], 0, list[_Draft]()
        for start in range(0, len(questions), SHARD):
            asked = questions[start : start + SHARD]
            said = self._play(self.space.unpruned(), asked)
            drafts += [self._draft(question, said, row) for row, question in enumerate(asked)]
            flops += said.decoder_flops
        self._drafts[block] = drafts
        metric, margin = ([d.metric for d in drafts], [d.margin for d in drafts])
        return Unpruned(np.array(metric), np.array(margin), flops)

    def settle(self, candidate: Candidate, layer: int) -> None:
        """Nothing can be held before a layer of a graph."""

    def evaluate(self, candidate: Candidate, shard: Shard) -> Outcome:
        """Feed the drafts token by token; where one fails, answer anew."""
        if shard.block not in self._drafts:
            self.unpruned(shard.block)
        questions = [self.blocks[shard.block][row] for row in shard.rows]
        drafts = [self._drafts[shard.block][row] for row in shard.rows]
        said = self._play(candidate, questions, drafts)
        kl = np.array(
            [
                divergence(draft.log_probs, _log_softmax(row[: len(draft.tokens)]))
                for draft, row in zip(drafts, said.logits, strict=True)
            ]
        )
        spent = [said.decoder_flops]

        def answer(rows: Sequence[int]) -> list[str]:
            anew = self._play(candidate, [questions[row] for row in rows])
            spent.append(anew.decoder_flops)
            return [self.prompts.text(self._until_end(row)) for row in anew.tokens]

        metric = metrics_by_drafts(self.metric, questions, drafts, said.tokens.tolist(), kl, answer)
        return Outcome(metric, kl, sum(spent))

    def _play(
        self, candidate: Candidate, questions: Sequence[Question], drafts: Sequence[_Draft] = ()
    ) -> _Said:
        """Answer greedily; or be fed the drafts, whatever is best after each of their tokens."""
        model, ends = self._model(candidate), self.artifact.manifest.model.eos_token_ids
        features = [self._feature(path, each) for each in questions for path in each.images]
        batch = model.pad([self.prompts.ids(question) for question in questions])
        flat = [one.reshape(-1, one.shape[-1]) for one in features]
        seen = [self.prompts.seen(path) for each in questions for path in each.images]
        cache = model.decoder.empty(len(questions))
        step = model.prefill(cache, batch, np.concatenate(flat) if flat else None, seen)
        logits, fed = [step.logits], _columns(drafts)
        limit = fed.shape[1] if drafts else self.max_new_tokens
        ended = np.zeros(len(questions), bool)
        while len(logits) < limit:
            best = logits[-1].argmax(-1)
            ended |= np.isin(best, ends)
            if not drafts and ended.all():
                break
            step = model.extend(step.cache, fed[:, len(logits) - 1] if drafts else best)
            logits.append(step.logits)
        rows, columns = batch.attention_mask.shape
        vision = batch.vision_index.shape[1]
        flops = self._flops(candidate, Width(rows, columns - vision, vision), len(logits) - 1)
        table = np.stack(logits, 1)
        return _Said(table.argmax(-1), table, flops)

    def _model(self, candidate: Candidate) -> Model:
        """The artifact's graphs under a candidate."""
        (score,) = self.space.scores
        if candidate.score != score and not candidate.is_unpruned:
            raise InputError(
                f"the artifact ranks tokens by {score}, not by {candidate.score}",
                where=str(self.artifact.folder),
                hint="search with its own score, or export another with --tunable",
            )
        keep = np.array(candidate.keeps[1:], np.int64)
        model = self.artifact.model
        return replace(model, decoder=model.decoder.with_keep(keep))

    def _flops(self, candidate: Candidate, width: Width, steps: int) -> int:
        prefill = call_flops(self.facts, candidate, width, 0, self.facts.layers, 1)
        return prefill + step_flops(self.facts, candidate, width, steps)

    def _feature(self, image: Path, question: Question) -> Array:
        """Of one image, encoded when it is first asked for."""
        key = image, self.prompts.read(question)
        if key not in self._features:
            self._features[key] = self.artifact.model.encode(
                self.prompts.image(*key).feeds
            ).features
        return self._features[key]

    def _draft(self, question: Question, said: _Said, row: int) -> _Draft:
        tokens = self._until_end(said.tokens[row])
        metric = metric_of(self.metric, question, self.prompts.text(tokens), 1.0, 0.0)
        return _Draft(tokens, metric, _log_softmax(said.logits[row, : len(tokens)]))

    def _until_end(self, row: Ints) -> tuple[int, ...]:
        """One answer, with the token that ended it."""
        tokens: list[int] = row.tolist()
        ends = self.artifact.manifest.model.eos_token_ids
        last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        return tuple(tokens[: last + 1])


def describe(folder: Path, device: str, max_new_tokens: int) -> dict[str, str]:
    """What answers depend on: every byte of the artifact, where it runs, how long an answer is."""
    manifest = _manifest(folder)
    content = manifest.model_dump(mode="json", include={"files", "source"})
    return {
        "evaluator": "artifact",
        "model": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        "dtype": manifest.dtype,
        "device": device.partition(":")[0],
        "max_new_tokens": str(max_new_tokens),
    }


def space_of(folder: Path) -> Space:
    """The artifact's one score, every layer; ArtifactError for what a search cannot turn."""
    manifest, facts = _manifest(folder), Processor(folder).facts
    schedule, stages = manifest.schedule, manifest.model.stages[1:]
    score = Score(schedule.score_from, schedule.query, schedule.heads)
    space = Space(facts, (score,))
    given = {name: getattr(schedule, name) for name in _AS_SEARCHED}
    prefill = Schedule.parse(schedule.text).prefill
    parts = prefill.model_dump(include={"threshold", "protect"})
    more = parts | {"rule": prefill.score.rule, "by": prefill.merge.by}
    missing = sorted(set(range(1, space.layers)) - {stage.first_layer for stage in stages})
    if manifest.model.reduced is not None:
        problem = "its vision encoder reduces tokens, and a search counts those of whole images"
    elif not manifest.tunable:
        problem = "its keeps are frozen"
    elif missing:
        problem = f"it has no cut before layers {', '.join(map(str, missing))}"
    elif any(s.keep is None or s.keep.denominator != space.parts for s in stages):
        problem = f"its keeps do not count in {space.parts} parts of an image"
    elif any(stage.first_layer == 0 for stage in stages):
        problem = "it has a cut before layer 0, which a search leaves alone"
    elif given != _AS_SEARCHED:
        problem = f"it has {given}, a search finds schedules with {_AS_SEARCHED}"
    elif more != _RANKED_AND_DROPPED:
        problem = f"its cuts have {more}, those of a search {_RANKED_AND_DROPPED}"
    else:
        return space
    tokens = f" --tokens {space.parts}" if facts.tokens_per_image else ""
    raise ArtifactError(
        f"the artifact cannot be searched on: {problem}",
        where=str(folder),
        hint=f"vtr schedule pyramid --ratio 1 --layers {space.layers} --parts {space.layers}"
        f"{tokens} --out open.yaml; choose its score; then vtr export --tunable -s open.yaml",
    )


def _manifest(folder: Path) -> Manifest:
    """Of an engine: that of the artifact it was built from."""
    if kind_of(folder) != "engine":
        return Manifest.load(folder)
    from vtr_export.engine_manifest import EngineManifest

    return EngineManifest.load(folder).artifact


def _threads(artifact: Path) -> int | None:
    """What torch would take, for ONNX Runtime does not ask."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) and kind_of(artifact) != "engine" else None


def _columns(drafts: Sequence[_Draft]) -> Ints:
    """The drafts' tokens ``[B, T]``; zeros behind the shorter ones."""
    longest = max((len(draft.tokens) for draft in drafts), default=0)
    table = np.zeros((len(drafts), longest), np.int64)
    for row, draft in zip(table, drafts, strict=True):
        row[: len(draft.tokens)] = draft.tokens
    return table


def _log_softmax(logits: Array) -> Floats:
    log_softmax = require("scipy.special", "search", "a search").log_softmax
    found: Floats = log_softmax(logits.astype(np.float64), axis=-1)
    return found
