"""What evaluations are said to cost against PyTorch's own count of matrix products."""

from typing import Any

import pytest
import torch
from tiny_models import IMAGE, PAD, pictures, prompt, tiny_llava
from torch.utils.flop_counter import FlopCounterMode

from vtr_export.families import read_facts
from vtr_export.reference import Reference, embed, pad_batch, positions_of
from vtr_export.search.candidate import Candidate, Score
from vtr_export.search.evaluators.work import Width, call_flops, step_flops

LAYERS, PARTS, BATCH, IMAGES, STEPS = 4, 16, 3, 2, 5
KEEPS = (PARTS, 9, 9, 4)
SCORES = [Score("previous", "last"), Score("next", "last", "max")]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(layers=LAYERS, kv_heads=2)


@pytest.fixture(scope="module")
def call(model: Any) -> tuple[torch.Tensor, ...]:
    """Two images a row: a keep of 9 of 16 parts leaves 18 of 32 tokens."""
    generator = torch.Generator().manual_seed(3)
    rows = [prompt(generator, PARTS, IMAGES) for _ in range(BATCH)]
    ids, mask = pad_batch(rows, PAD, IMAGE)
    embeds, vision = embed(model, ids, mask, pictures(model, BATCH * IMAGES, generator))
    return embeds, mask, positions_of(mask), vision


def decoder(model: Any, candidate: Candidate) -> Reference:
    facts = read_facts(model.config.to_dict(), "tiny")
    return Reference(model.model.language_model, model.lm_head, candidate.resolve(facts))


def angles(model: Any, columns: int) -> int:
    """FLOPs of one row's rotary angles, which are not counted."""
    with FlopCounterMode(display=False) as counter:
        model.model.language_model.rotary_emb(
            torch.zeros(1, columns, 8), torch.arange(columns)[None]
        )
    return int(counter.get_total_flops()) * BATCH


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize(("first", "last"), [(0, 2), (2, 4), (1, 3), (0, 4)])
def test_a_part_of_a_call_costs_what_it_multiplies(
    model: Any, call: tuple[torch.Tensor, ...], score: Score, first: int, last: int
) -> None:
    candidate = Candidate(KEEPS, score, PARTS)
    runs, facts = decoder(model, candidate), read_facts(model.config.to_dict(), "tiny")
    held = runs.advance(runs.hold(*call), first) if first else runs.hold(*call)
    with FlopCounterMode(display=False) as counter:
        end = runs.advance(held, last)
        model.lm_head(end.streams.hidden[:, -2:])
    text = call[1].shape[1] - IMAGES * PARTS
    columns = [IMAGES * keep + text for keep in KEEPS]
    rotated = sum(angles(model, columns[layer]) for layer in range(first, last))
    if score.source == "next":
        asked = [at for at in range(first + 1, last + 1) if at < LAYERS]
        asked = [at for at in asked if at == last or KEEPS[at] < KEEPS[at - 1]]
        rotated += sum(angles(model, columns[at - 1]) for at in asked)
    width = Width(BATCH, text, IMAGES * PARTS)
    expected = counter.get_total_flops() - rotated
    assert call_flops(facts, candidate, width, first, last, 2) == expected


def test_decode_steps_cost_what_they_multiply(model: Any, call: tuple[torch.Tensor, ...]) -> None:
    candidate = Candidate(KEEPS, SCORES[0], PARTS)
    runs, facts = decoder(model, candidate), read_facts(model.config.to_dict(), "tiny")
    embeds, mask, _, vision = call
    with FlopCounterMode(display=False) as prefill:
        runs.generate(model.get_input_embeddings(), embeds, mask, vision, max_new_tokens=1)
    with FlopCounterMode(display=False) as whole:
        runs.generate(model.get_input_embeddings(), embeds, mask, vision, max_new_tokens=STEPS + 1)
    width = Width(BATCH, call[1].shape[1] - IMAGES * PARTS, IMAGES * PARTS)
    rotated = LAYERS * STEPS * angles(model, 1)
    expected = whole.get_total_flops() - prefill.get_total_flops() - rotated
    assert step_flops(facts, candidate, width, STEPS) == expected
