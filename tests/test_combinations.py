"""Phases in one schedule: every vision-phase method before a pruned decoder, cache compacted or not.

Images go in and tokens come out through the shipped runtime; beside it the definitions.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import vision_cases
from test_vision_reductions import CASES

from vtr_export.exporter import export
from vtr_export.manifest import Reduced
from vtr_export.reference import Head, Reference, embed
from vtr_export.runtime.artifact import Artifact, Request
from vtr_export.runtime.sampling import Options
from vtr_export.runtime.session import open_session
from vtr_export.schedule import Resolved, Schedule

PREFILL = """
prefill:
  score: {query: text}
  stages: [{before_layer: 2, keep: 60%}, {before_layer: 4, keep: 1/3}, {before_layer: 6, keep: 10%}]
"""
DECODE = {"whole": "decode: []", "compacted": "decode: [{method: mustdrop}]"}
IMAGES = sorted((vision_cases.DIGITS.parent / "images").glob("*.png"))[:2]
PROMPTS = ("how many digits are there?", "which digit is the largest?")
STEPS = 6
RUNS = [(text, kind) for text, names in CASES if "digits" in names for kind in DECODE]
pytestmark = pytest.mark.usefixtures("one_trace")


@pytest.fixture(scope="module")
def artifacts(one_trace: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The digits sample behind PREFILL, with each way to keep a cache."""
    made = {}
    for kind, decode in DECODE.items():
        folder = tmp_path_factory.mktemp(kind) / "artifact"
        schedule = Schedule.parse(f"version: 1{PREFILL}{decode}\n")
        export(schedule, vision_cases.DIGITS, folder, verify="none")
        made[kind] = Artifact.load(folder, threads=1)
    return made


def reducing(artifact: Artifact, text: str, resolved: Resolved) -> Artifact:
    """``artifact`` with another vision encoder."""
    assert resolved.tower is not None
    vision = open_session(vision_cases.file_of("digits", text), threads=1)
    before, most = resolved.tower.grid.tokens, resolved.tokens_left
    reduced = Reduced(before=before, most=most, is_static=resolved.is_static)
    model = artifact.manifest.model.model_copy(update={"reduced": reduced})
    manifest = artifact.manifest.model_copy(update={"model": model})
    return replace(artifact, manifest=manifest, model=replace(artifact.model, vision=vision))


@cache
def resolve(text: str, kind: str) -> Resolved:
    """The schedule of the artifact, whose keeps are shares of an unreduced image."""
    both = Schedule.parse(f"version: 1\nvision: {text}{PREFILL}{DECODE[kind]}\n")
    alone = Schedule.parse(f"version: 1{PREFILL}{DECODE[kind]}\n")
    facts = vision_cases.traced("digits").facts
    return replace(
        alone.resolve(facts), vision=both.document.vision, tower=both.resolve(facts).tower
    )


@torch.no_grad()
def defined(text: str, resolved: Resolved, pixels: Any, row: Sequence[int]) -> list[int]:
    """The reference's answer to one prompt about one image."""
    model: Any = vision_cases.traced("digits").model
    (left,) = vision_cases.traced("digits").defined(text, pixels)
    ids = torch.tensor([row])
    mask = torch.ones_like(ids)
    embeds, index = embed(model, ids, mask, None, left.features)
    reference = Reference(model.get_decoder(), Head(model), resolved)
    words = model.get_input_embeddings()
    said = reference.generate(words, embeds, mask, index, max_new_tokens=STEPS)
    return [int(token) for token in said.tokens[0]]


@pytest.mark.parametrize(("text", "kind"), RUNS)
def test_phases_combine(text: str, kind: str, artifacts: dict[str, Artifact]) -> None:
    resolved = resolve(text, kind)
    artifact = reducing(artifacts[kind], text, resolved)
    requests = [Request(*pair) for pair in zip(PROMPTS, [[file] for file in IMAGES], strict=True)]
    prepared = artifact.prepare(requests)
    assert prepared.images is not None
    pixels = prepared.images.feeds["pixel_values"]
    answers, generated = artifact.answer(
        artifact.model.decoder.empty(2), prepared, Options(max_new_tokens=STEPS)
    )
    ends = artifact.manifest.model.eos_token_ids
    for number, row in enumerate(prepared.rows):
        wanted = defined(text, resolved, pixels[number : number + 1], row.ids)
        stop = next((at for at, token in enumerate(wanted) if token in ends), len(wanted))
        assert list(generated.tokens[number]) == wanted[:stop]
        assert answers[number].vision_tokens <= resolved.tokens_left
