"""A call held between layers goes on as if it had never stopped, and takes a draft along."""

from typing import Any

import pytest
import torch
from test_reference import reference
from tiny_models import IMAGE, PAD, pictures, prompt, tiny_llava

from vtr_export.reference import Reference, embed, pad_batch, positions_of

LAYERS, TOKENS = 5, 16
CUTS = {1: 9, 3: 4}
SCORES = [
    {"source": source, "query": query, "heads": heads}
    for source in ("previous", "next")
    for query, heads in (("last", "mean"), ("text", "max"))
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(layers=LAYERS)


@pytest.fixture(scope="module")
def call(model: Any) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    rows = [prompt(generator, TOKENS, 1) for _ in range(3)]
    ids, mask = pad_batch(rows, PAD, IMAGE)
    embeds, vision = embed(model, ids, mask, pictures(model, 3, generator))
    return embeds, mask, positions_of(mask), vision


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("stops", [(1,), (2,), (3,), (1, 2, 3, 4)], ids=str)
def test_stopping_on_the_way_changes_nothing(
    model: Any, call: tuple[torch.Tensor, ...], score: dict[str, str], stops: tuple[int, ...]
) -> None:
    ours = reference(model, CUTS, **score)
    held = ours.hold(*call)
    for stop in stops:
        held = ours.advance(held, stop)
    torch.testing.assert_close(ours.finish(held), ours(*call).hidden, rtol=0, atol=0)


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_one_held_call_serves_every_schedule_that_agrees_so_far(
    model: Any, call: tuple[torch.Tensor, ...], score: dict[str, str]
) -> None:
    shared = reference(model, {1: 9}, **score)
    held = shared.advance(shared.hold(*call), 3)
    for keep in (0, 3, 9):
        other = reference(model, {1: 9, 3: keep}, **score)
        torch.testing.assert_close(other.finish(held), other(*call).hidden, rtol=0, atol=0)


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_a_draft_is_judged_as_if_it_had_been_generated(
    model: Any, call: tuple[torch.Tensor, ...], score: dict[str, str]
) -> None:
    embeds, mask, _, vision = call
    ours = reference(model, CUTS, **score)
    table = model.get_input_embeddings()
    said = ours.generate(table, embeds, mask, vision, max_new_tokens=4)
    draft = said.tokens[:, :3]
    longer = torch.nn.functional.pad(mask, (0, 3), value=1)
    held = ours.hold(
        torch.cat((embeds, table(draft)), 1), longer, positions_of(longer), vision, drafted=3
    )
    torch.testing.assert_close(ours.finish(held), said.hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.lm_head(said.hidden), said.logits)


def test_fused_attention_says_the_same(model: Any, call: tuple[torch.Tensor, ...]) -> None:
    eager = reference(model, CUTS)
    fused = Reference(eager.decoder, eager.lm_head, eager.schedule, attention="sdpa")
    ours, theirs = eager(*call), fused(*call)
    torch.testing.assert_close(theirs.logits, ours.logits, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours.kept, theirs.kept, strict=True))


def test_some_rows_go_on_as_in_the_whole_batch(model: Any, call: tuple[torch.Tensor, ...]) -> None:
    ours = reference(model, CUTS)
    held = ours.advance(ours.hold(*call), 1)
    some = ours.finish(held.rows([2, 0]))
    torch.testing.assert_close(some, ours.finish(held)[[2, 0]], rtol=1e-4, atol=1e-5)
