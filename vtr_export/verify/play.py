"""Cases through the three graphs, end to end: pixels and ids in, logits and keep-sets out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vtr_export.passes.force_keep_sets import ForceKeepSets
from vtr_export.runtime.crossing import Crossed, states_at
from vtr_export.runtime.decoder import Decoder, Step
from vtr_export.runtime.encoder import encode as encode_images
from vtr_export.runtime.model import put
from vtr_export.runtime.session import Session
from vtr_export.verify.case import Array, Case, Ints
from vtr_export.verify.sessions import Forced, GraphError, Parts
from vtr_export.verify.taps import ShowScores


@dataclass(frozen=True)
class Inputs:
    """What the first two graphs make of a case."""

    case: Case
    features: Array  # [..., D], or [..., (1 + n) D] with planes
    text_embeds: Array  # [B, S, D], zeros where image features belong
    embeds: Array  # [B, S, D], or [B, S, (1 + n) D]
    steps: Array  # [B, n, D] of the tokens that follow


@dataclass(frozen=True)
class Played:
    """What the decoder made of it."""

    case: Case
    logits: Array  # [B, 1 + n, vocab]
    kept: tuple[Ints, ...]  # of the prefill; what was forced, if it was
    scores: tuple[Array, ...] = ()  # [B, V] of each cut of the prefill; only when forced


def encode(parts: Parts, cases: Sequence[Case]) -> list[Array]:
    """The image features of every case."""
    session = parts.open(parts.vision)
    return [encode_case(session, case) for case in cases]


def encode_case(session: Session, case: Case) -> Array:
    """``[..., D]``, the vision tokens of one case."""
    return encode_images(session, case.question.images).features


def embed(parts: Parts, cases: Sequence[Case], features: Sequence[Array]) -> list[Inputs]:
    """Every case as the decoder takes it."""
    session = parts.open(parts.embedding)
    pairs = zip(cases, features, strict=True)
    return [embed_case(session, *pair, beside=parts.beside) for pair in pairs]


def embed_case(session: Session, case: Case, features: Array, *, beside: bool = False) -> Inputs:
    """One case as the decoder takes it; ``beside``: features are no tokens."""
    question = case.question
    row, entry = np.nonzero(question.real_vision)
    places = row, question.vision_index[row, entry]
    ids = question.input_ids.copy()
    steps = _only(session, case.tokens)
    if beside or question.crossing:
        text = np.array(_only(session, ids))
        return Inputs(case, features, text, text, steps)
    ids[places] = 0  # an image's place may have no embedding
    text = np.array(_only(session, ids))
    text[places] = 0
    return Inputs(case, features, text, put(text, places, features), steps)


def play_free(parts: Parts, inputs: Sequence[Inputs]) -> tuple[list[Played], list[Played]]:
    """Every case as a user runs it; then its prefill alone with embeddings that are all NaN."""
    decoder = open_decoder(parts, parts.open(parts.decoder))
    _check_cuts(decoder.cuts, inputs)
    played = [play(decoder, each) for each in inputs]
    silent = []
    for each in inputs:
        step = _prefill(decoder, each, np.full_like(each.embeds, np.nan))
        silent.append(Played(each.case, step.logits[:, None], step.kept))
    return played, silent


def play_forced(parts: Parts, inputs: Sequence[Inputs]) -> list[Played]:
    """Every case with the reference's keep-sets, and what each cut scored."""
    session = Forced(parts.open(parts.decoder, (ShowScores(), *forced_passes())))
    _check_cuts(session.cuts, inputs)
    decoder = open_decoder(parts, session)
    return [play(decoder, each, session) for each in inputs]


def open_decoder(parts: Parts, session: Session) -> Decoder:
    """``session``, the decoder of ``parts`` in some form, with what compacts its cache."""
    return Decoder(session, parts.open_compaction(), keep=parts.keep)


def _check_cuts(count: int, inputs: Sequence[Inputs]) -> None:
    expected = len(inputs[0].case.kept)
    if count != expected:
        raise GraphError(f"the decoder has {count} cuts, the reference {expected}")


def forced_passes() -> tuple[ir.passes.PassBase, ...]:
    """The decoder without its choices."""
    return (ForceKeepSets(), RemoveUnusedNodesPass())


def play(decoder: Decoder, inputs: Inputs, forced: Forced | None = None) -> Played:
    """Prefill, then the tokens the reference chose, one by one."""
    case = inputs.case
    if forced is not None:
        forced.force(case.kept, case.kept_vision, case.labels)
        forced.shown.clear()
    step = _prefill(decoder, inputs, inputs.embeds)
    kept, logits = step.kept, [step.logits]
    if forced is not None:
        none = np.zeros((case.batch, 0), np.int64)
        first = none if case.question.crossing else np.zeros((case.batch, 1), np.int64)
        labels = [none] * len(case.labels)
        forced.force([first] * len(case.kept), [none] * len(case.kept), labels)
    for column in range(case.tokens.shape[1]):
        step = decoder(
            step.cache,
            inputs.steps[:, column : column + 1],
            np.ones((case.batch, 1), np.int64),
            np.zeros((case.batch, 0), np.int64),
        )
        logits.append(step.logits)
    return Played(case, np.stack(logits, 1), kept, _scores(forced))


def call_name(number: int, case: Case) -> str:
    """Of the call before which there were ``number`` others, for people."""
    return f"{f'decode step {number}' if number else 'the prefill'} of {case.question.name}"


def _scores(forced: Forced | None) -> tuple[Array, ...]:
    """Of the prefill, in the order of cuts."""
    first = forced.shown[0] if forced is not None else {}
    count = sum(name.startswith("score.") for name in first)
    return tuple(first[f"score.{cut}"] for cut in range(count))


def _prefill(decoder: Decoder, inputs: Inputs, embeds: Array) -> Step:
    question, cache = inputs.case.question, decoder.empty(len(embeds))
    if decoder.beside:
        columns = question.attention_mask, question.vision_index
        cache = decoder.with_images(cache, inputs.features, *columns)
    asked = question.attention_mask, question.vision_index, question.places, question.groups
    return decoder(cache, embeds, *asked, _crossed(inputs), protected=question.protected, kept=True)


def _crossed(inputs: Inputs) -> Crossed | None:
    """The images, where they are keys."""
    given = inputs.case.question.crossing
    if not given:
        return None
    states = states_at(inputs.features, given["features"])
    return Crossed(states, given["seen"], given["rows"])


def _only(session: Session, value: Array) -> Array:
    """The one output of a graph with one input."""
    (name,) = session.inputs
    (result,) = session.run({name: value}).values()
    return np.asarray(result)
