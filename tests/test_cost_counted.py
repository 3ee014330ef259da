"""The exact convention against PyTorch's own count of matrix products, in real tiny decoders."""

from typing import Any

import pytest
from test_families import tiny

from vtr_export.cost import (
    cut_flops,
    decode_cost,
    get_convention,
    prefill_cost,
    without_cuts,
)
from vtr_export.families import ModelFacts, read_facts
from vtr_export.schedule import Resolved, Schedule

torch = pytest.importorskip("torch", reason="its FLOP counter is the oracle")
transformers = pytest.importorskip("transformers", reason="its decoders are what is counted")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402 -- torch may be missing

from vtr_export.reference.decoder import Reference  # noqa: E402 -- torch may be missing

VISION, TEXT, STEPS, BEFORE_IMAGE = 4, 6, 5, 2
HEADS = {"grouped": 2, "multi-head": 4, "multi-query": 1}
SCHEDULES: dict[str, dict[str, Any]] = {
    "unpruned": {"keep": (4, 4, 4)},
    "one cut": {"keep": (4, 2, 2)},
    "all dropped": {"keep": (4, 4, 0)},
    "two cuts": {"keep": (4, 3, 1)},
    "inside": {"keep": (4, 3, 1), "drop_point": "inside"},
    "text": {"keep": (4, 3, 1), "score": {"query": "text", "heads": "max"}},
    "self and cross": {
        "keep": (4, 3, 1),
        "score": {"rule": "self_cross", "query": "text"},
        "drop_point": "inside",
    },
    "redundancy": {
        "keep": (4, 3, 1),
        "score": {"rule": "redundancy"},
        "drop_point": "attended",
    },
    "next": {"keep": (4, 3, 1), "score": {"from": "next"}},
}


def tiny_model(kv_heads: int) -> tuple[Any, ModelFacts]:
    config = tiny(text={"num_key_value_heads": kv_heads}, attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig.from_dict(config))
    return model.eval(), read_facts(config, "config.json")


def resolved(name: str, facts: ModelFacts) -> Resolved:
    return Schedule.from_data({"version": 1, "prefill": SCHEDULES[name]}).resolve(facts)


def counted(model: Any, schedule: Resolved, first_vision: int) -> tuple[int, int]:
    """FLOPs of prefill and of ``STEPS`` steps in the reference."""
    reference = Reference(model.model.language_model, model.lm_head, schedule)
    width = VISION + TEXT
    index = torch.arange(first_vision, first_vision + VISION)[None]
    with FlopCounterMode(display=False) as prefill:
        mask = torch.ones(1, width, dtype=torch.int64)
        step = reference(torch.randn(1, width, 16), mask, torch.arange(width)[None], index)
    with FlopCounterMode(display=False) as decode:
        for at in range(width, width + STEPS):
            mask = torch.ones(1, at + 1, dtype=torch.int64)
            step = reference(
                torch.randn(1, 1, 16), mask, torch.tensor([[at]]), index[:, :0], step.cache
            )
    return prefill.get_total_flops() - behind_attention(schedule, model), decode.get_total_flops()


def behind_attention(schedule: Resolved, model: Any) -> int:
    """What the reference spends on rows that a cut inside a layer has dropped already."""
    if schedule.drop_point == "between":
        return 0
    config = model.config.text_config
    row = 6 * config.hidden_size * config.intermediate_size
    if schedule.drop_point == "inside":
        row += 2 * config.hidden_size**2
    kept = (VISION, *(cut.keep.of(VISION) for cut in schedule.cuts))
    return (kept[0] - kept[-1]) * row


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "next"])
def test_exact_counts_every_matrix_product_of_the_pruned_decoder(name: str, heads: str) -> None:
    model, facts = tiny_model(HEADS[heads])
    schedule = resolved(name, facts)
    prefill, decode = counted(model, schedule, first_vision=0)
    assert prefill == prefill_cost(facts, schedule, VISION, TEXT, "exact")
    assert decode == decode_cost(facts, schedule, VISION, TEXT, STEPS, "exact")


def test_text_before_the_image_asks_nothing_though_it_is_counted() -> None:
    model, facts = tiny_model(2)
    schedule = resolved("text", facts)
    prefill, _ = counted(model, schedule, first_vision=BEFORE_IMAGE)
    bound = sum(cut_flops(facts, schedule, VISION, TEXT))
    less = bound * BEFORE_IMAGE // TEXT
    assert prefill == prefill_cost(facts, schedule, VISION, TEXT, "exact") - less


def test_from_next_the_reference_projects_twice_what_the_graph_gathers() -> None:
    model, facts = tiny_model(2)
    schedule = resolved("next", facts)
    prefill, decode = counted(model, schedule, first_vision=0)
    d, q, kv = facts.hidden, facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    twice = once = 0
    for before, after in ((4, 3), (3, 1)):
        twice += 2 * (before + TEXT) * d * (q + 2 * kv)
        once += 2 * d * (q + (before - after) * kv)  # the asking row, and keys that are dropped
    assert prefill - prefill_cost(facts, schedule, VISION, TEXT, "exact") == twice - once
    steps = decode_cost(facts, schedule, VISION, TEXT, STEPS, "exact")
    assert decode - steps == STEPS * len(schedule.cuts) * 2 * d * (q + 2 * kv)


def test_exact_decode_equals_transformers_with_its_cache() -> None:
    model, facts = tiny_model(2)
    language, width = model.model.language_model, VISION + TEXT
    language.config._attn_implementation = "eager"
    with torch.no_grad(), FlopCounterMode(display=False) as angles:
        language.rotary_emb(torch.zeros(1, 1, 16), torch.zeros(1, 1, dtype=torch.int64))
    with torch.no_grad():
        cache = language(inputs_embeds=torch.randn(1, width, 16), use_cache=True).past_key_values
        with FlopCounterMode(display=False) as decode:
            for _ in range(STEPS):
                done = language(inputs_embeds=torch.randn(1, 1, 16), past_key_values=cache)
                model.lm_head(done.last_hidden_state)
    schedule = Schedule.unpruned().resolve(facts)
    expected = decode_cost(facts, schedule, VISION, TEXT, STEPS, "exact")
    assert decode.get_total_flops() - STEPS * angles.get_total_flops() == expected


def test_a_step_costs_one_row_and_its_keys() -> None:
    """By hand: 3 layers of width 16, 2 kv heads of 4, MLP 24; caches of 10, 9 and 7."""
    _, facts = tiny_model(2)
    schedule = resolved("two cuts", facts)
    projections = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    keys = sum(past + step for past in (10, 9, 7) for step in (1, 2))
    macs = 2 * 3 * projections + 2 * keys * 16
    assert decode_cost(facts, schedule, VISION, TEXT, 2, "F-A") == macs
    assert decode_cost(facts, schedule, VISION, TEXT, 2, "F-C") == 2 * macs
    logits = 2 * 2 * 16 * 40
    assert decode_cost(facts, schedule, VISION, TEXT, 2, "exact") == 2 * macs + logits
    assert decode_cost(facts, schedule, VISION, TEXT, 0, "exact") == 0


@pytest.mark.parametrize("convention", ["F-A", "F-B", "F-C", "F-D", "exact"])
def test_decoding_costs_the_sum_of_its_steps(convention: str) -> None:
    """A prefill of n + 1 rows holds the last row's work and, whole, everyone's attention."""
    _, facts = tiny_model(2)
    whole = without_cuts(resolved("one cut", facts))
    one = [decode_cost(facts, whole, VISION, TEXT + i, 1, convention) for i in range(7)]
    assert decode_cost(facts, whole, VISION, TEXT, 7, convention) == sum(one)
    assert get_convention(convention).unit
