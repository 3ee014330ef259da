"""All three phases in one schedule, from the command to answers."""

from pathlib import Path

import numpy as np
import pytest
import vision_cases

from vtr_export.errors import InputError, ScheduleError
from vtr_export.exporter import Report, export
from vtr_export.families import read_facts
from vtr_export.runtime.artifact import Artifact, Request
from vtr_export.runtime.conversation import Conversation
from vtr_export.schedule import Schedule

ALL_PHASES = """
version: 1
vision:
- {method: prumerge+}
prefill:
  stages: [{before_layer: 2, keep: 50%}, {before_layer: 3, keep: 20%}]
decode:
- {method: mustdrop}
"""
IMAGES = sorted((vision_cases.DIGITS.parent / "images").glob("*.png"))[:3]
QUESTION = "how many digits are there?"
pytestmark = pytest.mark.usefixtures("checked_here", "one_trace")


@pytest.fixture(scope="module")
def report(checked_here: None, one_trace: None, tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("phases") / "artifact"
    return export(Schedule.parse(ALL_PHASES), vision_cases.DIGITS, folder, verify="all")


@pytest.fixture(scope="module")
def artifact(report: Report) -> Artifact:
    return Artifact.load(report.artifact, threads=1)


def test_every_gate_passes(report: Report) -> None:
    assert report.verified
    names = {gate.name for gate in report.gates}
    assert {"token_ids", "vision_encoder.cosine", "keep_sets.cut.1", "free.decode.cosine"} <= names


def test_the_first_layers_alone_are_verified(tmp_path: Path) -> None:
    done = export(
        Schedule.parse(ALL_PHASES), vision_cases.DIGITS, tmp_path / "a", verify="layers:4"
    )
    assert done.scope == "layers:4"
    assert done.verified


def test_a_prompt_is_as_long_as_its_own_image_is(artifact: Artifact) -> None:
    requests = [Request(QUESTION, [image]) for image in IMAGES]
    together = artifact.generate_batch(requests)
    alone = [artifact.generate(image, QUESTION) for image in IMAGES]
    assert len({answer.vision_tokens for answer in alone}) > 1, "else nothing is tested"
    for one, other in zip(together, alone, strict=True):
        assert (one.vision_tokens, one.prompt_tokens) == (other.vision_tokens, other.prompt_tokens)
        assert one.text == other.text
        for mine, theirs in zip(one.kept, other.kept, strict=True):
            assert np.array_equal(mine, theirs)


def test_two_images_of_one_prompt_have_what_each_has_alone(artifact: Artifact) -> None:
    both = artifact.generate(IMAGES[:2], "<image> <image> " + QUESTION)
    apart = sum(artifact.generate(image, QUESTION).vision_tokens for image in IMAGES[:2])
    assert both.vision_tokens == apart


def test_a_second_turn_sees_what_the_first_left(artifact: Artifact) -> None:
    said = Conversation(artifact)
    first = said.ask(QUESTION, IMAGES[0])
    assert first.vision_tokens == artifact.generate(IMAGES[0], QUESTION).vision_tokens
    second = said.ask("which digit is the largest?")
    assert second.vision_tokens == 0
    assert said.ask(QUESTION, IMAGES[1]).vision_tokens


def test_what_is_left_of_an_image_is_drawn(artifact: Artifact) -> None:
    answer = artifact.generate(IMAGES[0], QUESTION)
    drawn = artifact.show_kept(IMAGES[0], answer)
    assert drawn.width > drawn.height
    with pytest.raises(InputError, match="not those of this answer's call"):
        artifact.show_kept(IMAGES[:2], answer)


def test_a_model_without_such_a_tower_is_refused() -> None:
    schedule = Schedule.from_data(
        {"version": 1, "vision": [{"method": "fastervlm", "keep": "50%"}]}
    )
    assert schedule.resolve(vision_cases.traced("digits").facts).tokens_left == 72
    with pytest.raises(ScheduleError, match="one square of tokens") as caught:
        schedule.resolve(read_facts({"model_type": "llava_next"}, "config.json"))
    assert "vision" in str(caught.value.where)
