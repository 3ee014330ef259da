"""Which shapes an engine takes: defaults, flags, and the bounds of every input in every profile."""

from typing import Any

import pytest

from vtr_export.backends.tensorrt.profiles import choose_ranges, decoder_profiles, vision_profile
from vtr_export.engine_manifest import Ranges
from vtr_export.errors import EngineError, InputError
from vtr_export.manifest import DecoderFacts, Stage
from vtr_export.schedule import Keep

PORTS: dict[str, list[int | str | None]] = {
    "inputs_embeds": ["batch", "sequence", 32],
    "attention_mask": ["batch", "total"],
    "position_ids": [3, "batch", "sequence"],
    "past_key_values.0.key": ["batch", 2, "past", 8],
    "past_key_values.1.key": ["batch", 2, "past_1", 8],
    "vision_index": ["batch", "vision"],
    "past_mask.0": ["batch", "past_1"],
    "keep": [1],
}


def facts(tokens: int | None = 576, context: int = 4096) -> DecoderFacts:
    return DecoderFacts(
        model_type="llava", layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, vocab=64,
        context=context, image_token_id=4, tokens_per_image=tokens, eos_token_ids=(2,),
        stages=(Stage(first_layer=0),),
    )  # fmt: skip


def ranges(**changes: int) -> Ranges:
    return choose_ranges(facts(), changes)


def bounds(name: str, *, profile: int, **changes: int) -> list[tuple[int, ...]]:
    both = decoder_profiles(PORTS, ranges(**changes), [Keep(144, 576)])
    found = both[profile].inputs[name]
    return [found.least, found.best, found.most]


def test_defaults_take_one_image_and_what_the_context_leaves() -> None:
    assert ranges().model_dump() == {
        "max_batch": 1, "max_vision_tokens": 576, "max_text_tokens": 512, "max_new_tokens": 512,
        "opt_batch": 1, "opt_vision_tokens": 576, "opt_text_tokens": 64, "opt_new_tokens": 128,
    }  # fmt: skip
    small = choose_ranges(facts(context=600), {})
    assert (small.max_text_tokens, small.max_new_tokens, small.max_tokens) == (12, 12, 600)
    assert choose_ranges(facts(None), {"max_vision_tokens": 900}).opt_vision_tokens == 900


def test_a_prompt_and_a_later_turn_lie_in_the_context_profile() -> None:
    assert bounds("inputs_embeds", profile=0) == [(1, 1, 32), (1, 640, 32), (1, 1088, 32)]
    assert bounds("position_ids", profile=0, max_batch=4)[2] == (3, 4, 1088)
    assert bounds("vision_index", profile=0) == [(1, 0), (1, 576), (1, 576)]
    assert bounds("past_key_values.0.key", profile=0) == [(1, 2, 0, 8)] * 2 + [(1, 2, 1600, 8)]
    assert bounds("attention_mask", profile=0) == [(1, 1), (1, 640), (1, 1600 + 1088)]
    assert bounds("keep", profile=0) == [(0,), (144,), (576,)]


def test_generation_brings_one_token_and_no_image_to_each_stages_own_past() -> None:
    assert bounds("inputs_embeds", profile=1, max_batch=3) == [(1, 1, 32), (1, 1, 32), (3, 1, 32)]
    assert bounds("vision_index", profile=1) == [(1, 0), (1, 0), (2, 0)]
    whole, cut = 576 + 64 + 64, 144 + 64 + 64
    assert bounds("past_key_values.0.key", profile=1)[1] == (1, 2, whole, 8)
    assert bounds("past_key_values.1.key", profile=1)[1] == (1, 2, cut, 8)
    assert bounds("past_mask.0", profile=1) == [(1, 1), (1, cut), (2, 1600)]
    assert bounds("attention_mask", profile=1) == [(1, 2), (1, whole + 1), (2, 1601)]


def test_images_are_as_many_as_the_batch_may_hold() -> None:
    ports: dict[str, list[int | str | None]] = {"pixel_values": ["images", 3, 336, 336]}
    found = vision_profile(ports, ranges(max_batch=2, max_vision_tokens=1152), 576)
    shapes = found.inputs["pixel_values"]
    assert [s[0] for s in (shapes.least, shapes.best, shapes.most)] == [1, 1, 4]
    assert shapes.most[1:] == (3, 336, 336)


def test_what_an_encoder_reads_is_as_long_as_the_text() -> None:
    ports: dict[str, list[int | str | None]] = {
        "pixel_values": ["images", 3, 224, 224],
        "qformer_input_ids": ["images", "question"],
    }
    found = vision_profile(ports, ranges(max_batch=2, max_text_tokens=300), 576)
    asked = found.inputs["qformer_input_ids"]
    assert (asked.least, asked.most) == ((1, 1), (2, 300))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_batch": 0}, ["--max-batch is 0"]),
        ({"max_vision_tokens": -1}, ["--max-vision-tokens is -1"]),
        ({"opt_text_tokens": 513}, ["--opt-text-tokens 513", "--max-text-tokens 512"]),
        ({"max_new_tokens": 4096}, ["context of 4096", "lower --max-vision-tokens"]),
    ],
)
def test_ranges_that_do_not_fit_are_refused(changes: dict[str, int], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        ranges(**changes)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_model_whose_tokens_vary_must_be_told_how_many() -> None:
    with pytest.raises(InputError, match="--max-vision-tokens"):
        choose_ranges(facts(None), {})


def test_a_dimension_that_nothing_bounds_is_refused() -> None:
    ports: dict[str, Any] = {"past_key_values.9.key": ["batch", 2, "past_4", 8]}
    with pytest.raises(EngineError, match="past_4"):
        decoder_profiles(ports, ranges(), [Keep(144, 576)])
