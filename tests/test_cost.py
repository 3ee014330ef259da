"""Costs against published rows, hand counts and real tiny models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import LLAVA_7B, tiny

from vtr_export.cost import (
    CONVENTIONS,
    cut_flops,
    ideal_speedup,
    layer_rows,
    prefill_cost,
    vision_flops,
)
from vtr_export.devices import DEVICES, Device, get_device
from vtr_export.errors import InputError
from vtr_export.families import ModelFacts, read_facts
from vtr_export.memory import (
    WEIGHT_TYPES,
    Workload,
    get_weight_type,
    kv_bytes,
    parameters,
    parse_bytes,
    peak_bytes,
    weight_bytes,
)
from vtr_export.roofline import first_token_parts, next_token_parts, seconds
from vtr_export.schedule import Resolved, Schedule

LLAVA = read_facts(LLAVA_7B, "config.json")
TINY = read_facts(tiny(), "config.json")
NO_TEXT = 0
SAMPLES = Path(__file__).parents[1] / "samples" / "schedules"
FITPRUNE = {
    50: [
        3, 7, 49, 24, 29, 17, 59, 41, 26, 8, 10, 6, 2, 5, 7, 2, 30, 3, 13, 27, 5, 23, 2,
        1, 0, 0, 1, 1, 2, 0, 0, 0,
    ],
    60: [
        14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2,
        1, 0, 0, 1, 0, 1, 0, 0, 0,
    ],
    90: [
        262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0,
        0, 0, 1, 0, 0, 0, 0,
    ],
}  # fmt: skip


def teras(schedule: Schedule, facts: ModelFacts = LLAVA, convention: str = "F-A") -> float:
    resolved = schedule.resolve(facts)
    return prefill_cost(facts, resolved, facts.tokens_per_image or 0, NO_TEXT, convention) / 1e12


# published rows (methods.md 3.2 and 3.3), vision tokens only


@pytest.mark.parametrize(
    ("schedule", "tokens", "published", "recomputed"),
    [
        (Schedule.unpruned(), 576, 3.82, 3.817),
        (Schedule.pyramid(0.5), 576, 1.78, 1.777),
        (Schedule.fastv(2, 0.5), 576, 2.01, 2.007),
        (Schedule.unpruned(), 2880, 20.8, 20.825),
    ],
)
def test_the_published_rows(
    schedule: Schedule, tokens: int, published: float, recomputed: float
) -> None:
    cost = teras(schedule, replace(LLAVA, tokens_per_image=tokens))
    assert cost == pytest.approx(published, rel=0.005)
    assert cost == pytest.approx(recomputed, abs=0.0005)


@pytest.mark.parametrize(
    ("recipe", "final", "published", "reduction"),
    [(50, 173, 1.922, 0.497), (60, 127, 1.538, 0.597), (90, 37, 0.394, 0.897)],
)
def test_the_published_fitprune_recipes(
    recipe: int, final: int, published: float, reduction: float
) -> None:
    schedule = Schedule.from_deletions(FITPRUNE[recipe], tokens=576)
    assert schedule.resolve(LLAVA).keep_per_layer(576)[-1] == final
    assert teras(schedule) == pytest.approx(published, rel=0.005)
    assert 1 - teras(schedule) / teras(Schedule.unpruned()) == pytest.approx(reduction, abs=0.0005)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("fastv", 2.01),
        ("pyramid", 1.78),
        ("fitprune_50", 1.922),
        ("fitprune_60", 1.538),
        ("fitprune_90", 0.394),
    ],
)
def test_a_sample_costs_what_is_published(name: str, published: float) -> None:
    schedule = Schedule.load(SAMPLES / f"{name}.yaml")
    assert teras(schedule) == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(("leave", "published"), [(35, 3.3), (41, 2.4), (47, 1.5)])
def test_ficoco_v_costs_what_is_published(leave: int, published: float) -> None:
    """Its tables count the decoder alone, with 60 tokens of text."""
    resolved = Schedule.ficoco(leave).resolve(LLAVA)
    cost = prefill_cost(LLAVA, resolved, 576, 60, "F-C")
    assert cost / 1e12 == pytest.approx(published, abs=0.05)


@pytest.mark.parametrize(("drop_point", "share"), [("inside", 0.403), ("between", 0.421)])
def test_the_drop_point_is_part_of_the_cost(drop_point: str, share: float) -> None:
    keeps = Schedule.from_deletions(FITPRUNE[60], tokens=576).resolve(LLAVA).keep_per_layer(576)
    schedule = Schedule.from_keeps(keeps, drop_point=drop_point)
    assert teras(schedule) / teras(Schedule.unpruned()) == pytest.approx(share, abs=0.0005)


# conventions


def test_formulas_as_published() -> None:
    n, d, m, layers = 576, 4096, 11008, 32
    expected = {
        "F-A": 4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m,
        "F-B": 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m,
    }
    expected |= {"F-C": 2 * expected["F-A"], "F-D": 24 * n * d**2 + 4 * n**2 * d}
    expected["exact"] = expected["F-C"]
    for name in CONVENTIONS:
        logits = 2 * d * 32064 if name == "exact" else 0
        assert teras(Schedule.unpruned(), convention=name) * 1e12 == pytest.approx(
            layers * expected[name] + logits, rel=1e-12
        )


def test_grouped_heads_and_ungated_mlps_cost_what_they_do() -> None:
    resolved = Schedule.unpruned().resolve(TINY)
    n, d, kv, m = 10, 16, 8, 24
    per_layer = 2 * n * d * d + 2 * n * d * kv + 2 * n * n * d
    assert prefill_cost(TINY, resolved, 4, 6, "F-A") == 3 * (per_layer + 3 * n * d * m)
    assert prefill_cost(replace(TINY, gated=False), resolved, 4, 6, "F-A") == 3 * (
        per_layer + 2 * n * d * m
    )


def test_text_counts_in_every_layer() -> None:
    rows = layer_rows(Schedule.vtw(2).resolve(TINY), 4, 6)
    assert [row.entering for row in rows] == [10, 10, 6]


def test_an_unknown_convention_names_the_known() -> None:
    with pytest.raises(InputError, match="F-Z") as caught:
        prefill_cost(TINY, Schedule.unpruned().resolve(TINY), 4, 6, "F-Z")
    assert "F-A" in caught.value.hint


def test_exact_equals_the_matrix_products_of_the_real_decoder() -> None:
    torch = pytest.importorskip("torch", reason="its FLOP counter is the oracle")
    transformers = pytest.importorskip("transformers", reason="its decoder is what is counted")
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.LlavaConfig.from_dict(tiny(attn_implementation="eager"))
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
        language, vision = model.model.language_model, model.model
        language.config._attn_implementation = "eager"
        vision.vision_tower.config._attn_implementation = "eager"
        with FlopCounterMode(display=False) as decoder:
            hidden = language(inputs_embeds=torch.zeros(1, 10, 16)).last_hidden_state
            model.lm_head(hidden[:, -1:])
        with FlopCounterMode(display=False) as tower:
            vision.get_image_features(
                torch.zeros(2, 3, 9, 9),
                vision_feature_layer=-2,
                vision_feature_select_strategy="default",
            )
    resolved = Schedule.unpruned().resolve(TINY)
    rotary = 2 * 10 * TINY.head_dim // 2  # inverse frequencies times positions
    assert decoder.get_total_flops() - prefill_cost(TINY, resolved, 4, 6, "exact") in (0, rotary)
    assert TINY.vision is not None
    last = 2 * (
        4 * 5 * 8 * 8 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 12
    )  # transformers runs the last layer too
    assert tower.get_total_flops() == vision_flops(TINY, 2) + 2 * last


def test_cuts_cost_their_scores() -> None:
    d, q, kv, n = 16, 16, 8, 10
    stages = {"before_layer": 1, "keep": 1}
    for options, expected in (
        ({}, 2 * n * q),
        ({"score": {"query": "text"}}, 6 * 2 * n * q),
        ({"score": {"from": "next"}}, 2 * n * q + 2 * d * q + 2 * d * 3 * kv),
    ):
        schedule = Schedule.from_data({"version": 1, "prefill": {**options, "stages": (stages,)}})
        assert cut_flops(TINY, schedule.resolve(TINY), 4, 6) == (expected,)
        assert cut_flops(TINY, schedule.resolve(TINY), 0, 6) == (0,)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=2),
    st.integers(0, 50),
    st.sampled_from(sorted(CONVENTIONS)),
    st.sampled_from(["inside", "between"]),
)
def test_keeping_less_never_costs_more_but_for_the_cuts(
    keeps: list[int], text: int, convention: str, drop_point: str
) -> None:
    keeps = [4, *sorted(keeps, reverse=True)]
    resolved = Schedule.from_keeps(keeps, drop_point=drop_point).resolve(TINY)
    whole = Schedule.unpruned().resolve(TINY)
    scores = sum(cut_flops(TINY, resolved, 4, text)) if convention == "exact" else 0
    pruned = prefill_cost(TINY, resolved, 4, text, convention)
    assert pruned <= prefill_cost(TINY, whole, 4, text, convention) + scores


def test_ideal_speedup_of_fastv_on_llava() -> None:
    assert ideal_speedup(LLAVA, Schedule.fastv().resolve(LLAVA), 576, 64) == pytest.approx(
        1.747, abs=0.001
    )
    assert ideal_speedup(LLAVA, Schedule.unpruned().resolve(LLAVA), 576, 64) == 1.0


# bytes


@pytest.mark.parametrize("text", [{}, {"model_type": "qwen2", "tie_word_embeddings": True}])
def test_parameters_equal_those_of_a_real_tiny_model(text: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="the oracle is a model of it")
    transformers = pytest.importorskip("transformers", reason="the oracle is its model")
    config = tiny(text=text)
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig.from_dict(config)
        )
    held = {
        id(p): p.numel()
        for name, p in model.named_parameters()
        if not any(
            part in name
            for part in (
                "post_layernorm",
                "vision_tower.encoder.layers.2",
                "vision_model.encoder.layers.2",
            )
        )
    }
    facts = read_facts(config, "x")
    assert parameters(facts).total == sum(held.values())
    assert weight_bytes(facts, get_weight_type("fp32")) == 4 * sum(held.values())


def test_llava_7b_weighs_what_it_does() -> None:
    assert parameters(LLAVA).total == pytest.approx(7.05e9, rel=0.01)
    sizes = [weight_bytes(LLAVA, kind) / 2**30 for kind in WEIGHT_TYPES.values()]
    assert sizes == pytest.approx([26.3, 13.13, 13.13, 6.98, 4.35, 6.98, 4.35], abs=0.1)


def test_the_cache_has_a_length_per_stage() -> None:
    schedule = Schedule.from_keeps([4, 2, 1]).resolve(TINY)
    work = Workload(vision_tokens=4, text_tokens=6, batch=3)
    per_token = 2 * 2 * 4 * 2  # key and value, 2 heads, width 4, fp16
    assert kv_bytes(TINY, schedule, work, get_weight_type("fp16"), 5) == 3 * per_token * (
        10 + 8 + 7 + 3 * 5
    )


def test_inside_keeps_the_whole_cache_of_its_layer() -> None:
    between, inside = (
        Schedule.from_keeps([4, 2, 1], drop_point=p).resolve(TINY) for p in ("between", "inside")
    )
    work, kind = Workload(4, 6), get_weight_type("fp16")
    assert kv_bytes(TINY, between, work, kind, 0) == kv_bytes(TINY, inside, work, kind, 0)
    assert layer_rows(inside, 4, 6)[0].leaving == 8


def test_peak_says_what_dominates() -> None:
    whole, kind = Schedule.unpruned().resolve(LLAVA), get_weight_type("int4")
    assert peak_bytes(LLAVA, whole, Workload(576, 64), kind, fused=True).dominant == "weights"
    long = peak_bytes(LLAVA, whole, Workload(576, 64, batch=64, new_tokens=3000), kind, fused=True)
    assert long.dominant.startswith("decode")
    last = kv_bytes(LLAVA, whole, Workload(576, 64, batch=64), kind, 3000)
    assert long.decode == 2 * last  # past goes in, present comes out
    wide = Workload(2880, 64, images=5)
    fused, plain = (peak_bytes(LLAVA, whole, wide, kind, fused=f) for f in (True, False))
    assert plain.prefill - fused.prefill > 32 * 2900**2 * 3  # n x n scores in fp32
    assert plain.total == plain.weights + max(plain.vision, plain.prefill, plain.decode)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("512MiB", 2**29),
        ("123", 123),
        ("2k", 2000),
        ("7b", 7),
    ],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "8 giga", "-1GiB", "GiB", "1e9", "0"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(InputError):
        parse_bytes(text)


# time

FAST = Device("x", bandwidth=1e30, fp32_flops=1.0, fp16_flops=2.0)
SLOW = Device("x", bandwidth=1.0, fp32_flops=1e30, fp16_flops=1e30)


def test_roofline_takes_the_slower_of_arithmetic_and_bytes() -> None:
    assert seconds([(6, 4), (1, 9)], Device("x", 2.0, 3.0, 3.0), "fp32") == 2 + 4.5


def test_first_token_is_all_arithmetic_or_all_bytes() -> None:
    resolved: Resolved = Schedule.fastv(1).resolve(TINY)
    work, kind = Workload(4, 6), get_weight_type("fp32")
    parts = first_token_parts(TINY, resolved, work, kind)
    expected = prefill_cost(TINY, resolved, 4, 6, "exact") + vision_flops(TINY, 1)
    assert seconds(parts, FAST, "fp32") == expected
    assert seconds(parts, FAST, "int4") == expected / 2
    moved = 4 * (parameters(TINY).total - 40 * 16 - 16) + kv_bytes(TINY, resolved, work, kind, 0)
    assert seconds(parts, SLOW, "fp32") == moved


def test_the_next_token_reads_weights_and_cache_once() -> None:
    resolved, kind = Schedule.fastv(1).resolve(TINY), get_weight_type("fp16")
    work = Workload(4, 6, batch=2, new_tokens=8)
    count = parameters(TINY)
    read = 2 * (3 * (count.layer_linear + count.layer_other) + count.head) + kv_bytes(
        TINY, resolved, work, kind, 5
    )
    assert seconds(next_token_parts(TINY, resolved, work, kind), SLOW, "fp16") == read


def test_devices_have_names() -> None:
    assert set(DEVICES) == {"orin-nx", "agx-orin", "rtx-4090", "h100", "cpu"}
    with pytest.raises(InputError, match="orin"):
        get_device("orin")
