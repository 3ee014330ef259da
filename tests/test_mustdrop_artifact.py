"""MustDrop in all three phases, from a schedule to answers, beside its definition."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vision_cases
from conftest import in_this_process

from vtr_export.errors import ArtifactError
from vtr_export.exporter import export
from vtr_export.manifest import Gate, Manifest
from vtr_export.reference import Generation, Head, Reference, embed
from vtr_export.runtime.artifact import Answer, Artifact, Prepared, Request
from vtr_export.runtime.encoder import encode
from vtr_export.runtime.generation import Generated
from vtr_export.runtime.sampling import Options
from vtr_export.schedule import Schedule
from vtr_export.verify.golden import load_golden

TEXT = """version: 1
vision: [{method: mustdrop, similarity: 0.6}]
prefill:
  score: {query: text}
  positions: repacked
  threshold: {whole: 0.014, single: 0.05}
  protect: keys
  stages: [{before_layer: 1, keep: 100%}, {before_layer: 3, keep: 100%}]
decode: [{method: mustdrop}]
"""
SCHEDULE = Schedule.parse(TEXT)
IMAGES = sorted((vision_cases.DIGITS.parent / "images").glob("*.png"))[:2]
PROMPTS = ("how many digits are there?", "which digit is the largest?")
STEPS = 5


@pytest.fixture(scope="module")
def exported(one_trace: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits sample."""
    folder = tmp_path_factory.mktemp("mustdrop") / "artifact"
    with in_this_process():
        export(SCHEDULE, vision_cases.DIGITS, folder, verify="all")
    return folder


@pytest.fixture(scope="module")
def artifact(exported: Path) -> Artifact:
    return Artifact.load(exported, threads=1)


def ask(artifact: Artifact, rows: list[int]) -> tuple[Prepared, list[Answer], Generated]:
    prepared = artifact.prepare([Request(PROMPTS[row], [IMAGES[row]]) for row in rows])
    empty = artifact.model.decoder.empty(len(rows))
    return prepared, *artifact.answer(empty, prepared, Options(max_new_tokens=STEPS))


def test_it_is_verified_where_rows_keep_unlike_numbers(exported: Path) -> None:
    manifest = Manifest.load(exported)
    gates: dict[str, Gate] = {gate.name: gate for gate in manifest.gates}
    assert manifest.verified
    assert gates["vision_encoder.protected"].measured == 1
    assert gates.keys() >= {"keep_sets.counts", "scores.cut.1", "forced.decode.cosine"}
    case = load_golden(exported / "golden" / "batch.npz")
    assert case.question.protected is not None
    stays = [(scores >= 1).sum(1).tolist() for scores in case.scores]
    whole = case.question.vision_index.shape[1]
    assert whole < 144  # like windows are merged
    assert all(0 < count < whole for counts in stays for count in counts)
    assert stays[0] != stays[1]


@torch.no_grad()
def defined(row: int, prepared: Prepared, pixels: Any) -> tuple[Generation, np.ndarray[Any, Any]]:
    """The reference's answer to one prompt about one image, and what it protects."""
    tiny = vision_cases.traced("digits")
    (left,) = tiny.defined("[{method: mustdrop, similarity: 0.6}]", pixels)
    assert left.protected is not None
    ids = torch.tensor([prepared.rows[row].ids])
    mask = torch.ones_like(ids)
    embeds, index = embed(tiny.model, ids, mask, None, left.features)
    schedule = SCHEDULE.resolve(tiny.facts)
    reference = Reference(tiny.model.get_decoder(), Head(tiny.model), schedule)
    words, marks = tiny.model.get_input_embeddings(), left.protected[None].long()
    asked = words, embeds, mask, index
    said = reference.generate(*asked, max_new_tokens=STEPS, protected=marks)
    return said, left.protected.numpy()


def test_answers_are_those_of_the_definition(artifact: Artifact) -> None:
    """Two prompts side by side; each keeps its own tokens, and protected ones are among them."""
    prepared, answers, generated = ask(artifact, [0, 1])
    assert prepared.images is not None
    pixels = prepared.images.feeds["pixel_values"]
    ends = artifact.manifest.model.eos_token_ids
    counts = []
    for row, answer in enumerate(answers):
        said, protected = defined(row, prepared, pixels[row : row + 1])
        wanted = said.tokens[0].tolist()
        stop = next((at for at, token in enumerate(wanted) if token in ends), len(wanted))
        assert list(generated.tokens[row]) == wanted[:stop]
        assert answer.vision_tokens == len(protected)
        for kept, columns in zip(answer.kept, said.prefill.kept_vision, strict=True):
            assert len(kept) == columns.shape[1]
            assert set(np.flatnonzero(protected)) <= set(kept.tolist())
        counts.append([len(kept) for kept in answer.kept])
        (alone,) = ask(artifact, [row])[1]
        assert alone.token_ids == answer.token_ids
        assert all((one == two).all() for one, two in zip(alone.kept, answer.kept, strict=True))
    assert counts[0] != counts[1]


def test_what_is_protected_is_what_the_encoder_says(artifact: Artifact) -> None:
    """Without its word the decoder is not run; and what it does not drop follows that word."""
    prepared = ask(artifact, [0])[0]
    assert prepared.images is not None
    encoded = encode(artifact.model.vision, prepared.images.feeds)
    assert encoded.protected is not None
    share = -(-encoded.tokens * 2 // 25)
    assert encoded.protected.sum() == share
    batch = artifact.model.pad([row.ids for row in prepared.rows])
    empty = artifact.model.decoder.empty(1)
    with pytest.raises(ArtifactError, match="protected"):
        artifact.model.prefill(empty, batch, encoded.features, prepared.seen)
    every = np.ones_like(encoded.protected)
    step = artifact.model.prefill(empty, batch, encoded.features, prepared.seen, protected=every)
    assert [kept.shape[1] for kept in step.kept] == [batch.input_ids.shape[1]] * 2
