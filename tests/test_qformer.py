"""BLIP-2 and InstructBLIP: learned positions, an image before all text, an encoder that reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_qformers
import torch
import transformers
from PIL import Image
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)

from vtr_export import Artifact, Schedule, export
from vtr_export.errors import CheckpointError, InputError, ScheduleError
from vtr_export.families import read_facts
from vtr_export.memory import parameters
from vtr_export.runtime.artifact import Request
from vtr_export.runtime.conversation import Conversation
from vtr_export.runtime.processor import Processor
from vtr_export.runtime.sampling import Options
from vtr_export.search.evaluators.torch_model import TorchModel
from vtr_export.search.questions.calibration import Question

SHORT, LONG = "how many ?", "what colour is the digit on the left , red or green ?"
MODELS = {
    Blip2Config: Blip2ForConditionalGeneration,
    InstructBlipConfig: InstructBlipForConditionalGeneration,
}


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 45, 3), np.uint8))


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An InstructBLIP, unpruned, and its checkpoint beside it."""
    folder = tmp_path_factory.mktemp("instructblip")
    tiny_qformers.instructblip(folder / "checkpoint")
    export(Schedule.unpruned(), folder / "checkpoint", folder / "out", verify="none")
    return folder


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "text",
    [
        tiny_qformers.OPT,
        {**tiny_qformers.OPT, "enable_bias": False},
        {**tiny_qformers.OPT, "tie_word_embeddings": False},
        tiny_qformers.LLAMA,
    ],
)
def test_counts_equal_those_of_a_real_tiny_model(kind: Any, text: dict, every: int) -> None:
    config = kind(
        vision_config=tiny_qformers.VISION,
        qformer_config={**tiny_qformers.QFORMER, "cross_attention_frequency": every},
        text_config=text,
        num_query_tokens=5,
        image_token_index=4,
    )
    with torch.device("meta"):
        model = MODELS[kind](config)
    facts = read_facts(config.to_dict(), "config.json")
    assert parameters(facts).total == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("kind", ["blip-2", "instructblip", "instructblipvideo"])
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"text_config": {"model_type": "t5"}, "image_token_index": 4}, "encoder-decoder"),
        ({"text_config": {"model_type": "opt"}}, "no token for an image's places"),
        ({"text_config": 3, "image_token_index": 4}, "text_config is "),
    ],
)
def test_refused_by_the_config(kind: str, config: dict, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_facts({"model_type": kind, **config}, "config.json")


@pytest.mark.parametrize(
    "form",
    [{"do_layer_norm_before": False}, {"word_embed_proj_dim": 512}, {"num_attention_heads": 7}],
)
def test_older_forms_of_opt_are_refused(form: dict) -> None:
    config = {"model_type": "blip-2", "image_token_index": 4, "text_config": form}
    with pytest.raises(CheckpointError, match=next(iter(form)).replace("num_attention_", "")):
        read_facts(config, "config.json")


def test_learned_positions_cannot_be_repacked() -> None:
    facts = read_facts({"model_type": "blip-2", "image_token_index": 4}, "config.json")
    prefill = {"positions": "repacked", "stages": [{"before_layer": 2, "keep": "50%"}]}
    with pytest.raises(ScheduleError, match="learned"):
        Schedule.from_data({"version": 1, "prefill": prefill}).resolve(facts)


def test_what_the_encoder_reads_is_what_transformers_processor_gives(reading: Path) -> None:
    theirs = InstructBlipProcessor.from_pretrained(reading / "checkpoint", backend="pil")
    ours = Processor(reading / "out")
    for text in (SHORT, LONG, "How MANY, café?"):
        said = theirs(images=picture(), text=text, return_tensors="np")
        inputs = ours.reading(ours.image_inputs([picture()]), [text])
        assert inputs.given.keys() == said.keys() - {"input_ids", "attention_mask"}
        for name, values in inputs.given.items():
            assert np.array_equal(values, said[name]), name
        assert ours.token_ids(text, inputs.seen) == said["input_ids"][0].tolist()


def test_features_depend_on_the_question_alone_and_not_on_its_neighbour(reading: Path) -> None:
    artifact = Artifact.load(reading / "out", threads=1)

    def features(*texts: str) -> np.ndarray:
        prepared = artifact.prepare([Request(text, [picture()]) for text in texts])
        assert prepared.images is not None
        return artifact.model.encode(prepared.images.feeds).features

    together, short = features(SHORT, LONG), features(SHORT)
    assert np.abs(together[0] - short[0]).max() < 1e-5
    assert np.abs(together[1] - short[0]).max() > 5e-4  # weights are random, and hardly read


def test_a_search_encodes_an_image_anew_for_each_question(reading: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "image.png")
    texts, images = (SHORT, LONG), (tmp_path / "image.png",)
    model = TorchModel(reading / "checkpoint", "cpu", "fp32")
    batch = model.batch([Question(images, text, (), "here", text) for text in texts])
    theirs = InstructBlipProcessor.from_pretrained(reading / "checkpoint", backend="pil")
    for row, text in enumerate(texts):
        said = theirs(images=picture(), text=text, return_tensors="pt")
        wanted = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
        with torch.no_grad():
            own = model.model.get_image_features(**{name: said[name] for name in wanted})
        found = batch.embeds[row, batch.vision[row]]
        assert torch.allclose(found, own.pooler_output[0], atol=1e-5)


def test_too_long_a_question_is_refused(reading: Path) -> None:
    artifact = Artifact.load(reading / "out", threads=1)
    with pytest.raises(InputError, match="reads 120 tokens"):
        artifact.generate([picture()], "what " * 130)


@pytest.mark.parametrize(
    ("images", "prompt"), [(2, SHORT), (1, "what is <image> there ?"), (0, "<image>how many")]
)
def test_one_image_stands_before_all_text(reading: Path, images: int, prompt: str) -> None:
    artifact = Artifact.load(reading / "out", threads=1)
    with pytest.raises(InputError, match="one image"):
        artifact.generate([picture()] * images, prompt)


def test_a_place_that_leads_the_prompt_says_nothing_more(reading: Path) -> None:
    artifact = Artifact.load(reading / "out", threads=1)
    without, placed = (
        artifact.prepare([Request(text, [picture()])]) for text in (SHORT, f"<image>{SHORT}")
    )
    assert without.rows == placed.rows
    assert without.images is not None
    assert placed.images is not None
    for name, values in without.images.feeds.items():
        assert np.array_equal(values, placed.images.feeds[name])


def test_a_second_turn_goes_on_without_an_image(reading: Path) -> None:
    artifact = Artifact.load(reading / "out", threads=1)
    talk = Conversation(artifact)
    talk.ask(SHORT, [picture()], max_new_tokens=3)
    talk.ask(LONG, max_new_tokens=3)
    with pytest.raises(InputError, match="first turn"):
        talk.ask(LONG, [picture()], max_new_tokens=3)


def test_queries_have_no_places_to_be_drawn_at(reading: Path) -> None:
    artifact = Artifact.load(reading / "out", threads=1)
    answer = artifact.generate([picture()], SHORT, max_new_tokens=1)
    with pytest.raises(InputError, match="no single grid"):
        artifact.show_kept([picture()], answer)


def test_rows_of_unlike_length_get_the_positions_that_opt_gives_them_alone(tmp_path: Path) -> None:
    model = tiny_qformers.blip_2(tmp_path / "checkpoint").eval()
    export(Schedule.unpruned(), tmp_path / "checkpoint", tmp_path / "out", verify="none")
    artifact = Artifact.load(tmp_path / "out", threads=1)
    requests = [Request(SHORT, [picture()]), Request(LONG, [picture(1)])]
    said = artifact.generate_batch(requests, Options(16))
    processor = transformers.Blip2Processor.from_pretrained(tmp_path / "checkpoint", backend="pil")
    for request, answer in zip(requests, said, strict=True):
        inputs = processor(images=request.images[0], text=request.prompt, return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        expected = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(answer.token_ids) == expected[: len(answer.token_ids)]
        assert len(answer.token_ids) in (16, expected.index(2) if 2 in expected else 16)
