"""Rows of unlike counts: where a cut takes more of a short row than of the widest, and no pad is left."""

from typing import Any

import numpy as np
import pytest
import torch
from cut_graphs import Client, Tracer
from cut_oracle import Call, calls
from hypothesis import given
from hypothesis import strategies as st
from test_ops import run
from tiny_models import tiny_llava

from vtr_export import ops
from vtr_export.reference import Reference, positions_of
from vtr_export.schedule import Cut, Keep, Resolved

RAGGED = ops.Choice(ragged=True)
HALF_THEN_TWO_FIFTHS = (Cut(1, Keep(1, 2)), Cut(2, Keep(2, 5)))  # of 5: 2, 2; of 4: 2, 1


@given(calls(st.integers(0, 9)), st.data())
def test_select_keeps_no_more_than_a_rows_budget(call: Call, data: st.DataObject) -> None:
    batch, _, length, tokens = call.sizes
    keep = data.draw(st.integers(0, tokens))
    counts = [int(count) for count in call.counts]
    budget = [data.draw(st.integers(0, min(keep, count))) for count in counts]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    score = rng.integers(0, 4, (batch, tokens)).astype(np.float32)
    score[np.take_along_axis(call.current, call.vision, 1) == 0] = -2
    feeds = {"score": score, "keep": np.array([keep]), "budget": np.array(budget)}
    indices, vision = run(
        "VtrSelectRagged", RAGGED, vision_index=call.vision, hidden=call.hidden(), **feeds
    )
    (alive,) = run(
        "VtrAlive", padding=np.take_along_axis(call.current, indices, 1), indices=indices
    )
    for b, row in enumerate(call.vision.tolist()):
        pads = row[: tokens - counts[b]][: keep - budget[b]]
        best = sorted(range(tokens), key=lambda e, b=b: (-score[b, e], e))[: budget[b]]  # type: ignore[misc]
        kept = sorted(pads + [row[entry] for entry in best])
        stand_ins = keep - len(kept)
        others = [column for column in range(length) if column in kept or column not in row]
        assert indices[b].tolist() == [length - 1] * stand_ins + others
        assert alive[b].tolist() == [0] * stand_ins + call.current[b, others].tolist()
        places = [stand_ins + n for n, column in enumerate(others) if column in kept]
        assert vision[b].tolist() == list(range(stand_ins)) + places


@pytest.mark.parametrize("source", ["previous", "next"])
@pytest.mark.parametrize("positions", ["original", "repacked"])
def test_the_reference_gives_a_row_what_it_gives_it_alone(source: Any, positions: Any) -> None:
    model = tiny_llava(layers=3)
    decoder = model.model.language_model
    schedule = Resolved(3, None, HALF_THEN_TWO_FIFTHS, source=source, positions=positions)
    reference = Reference(decoder, model.lm_head, schedule)
    embeds = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 8, [0] + [1] * 7])
    vision = torch.tensor([[1, 2, 3, 4, 5], [0, 2, 3, 4, 5]])
    both = reference(embeds, mask, positions_of(mask), vision)
    assert [padding.sum(1).tolist() for padding in both.cache.padding] == [[8, 7], [5, 5], [5, 4]]
    for row, first in ((0, 0), (1, 1)):
        own = torch.ones(1, 8 - first, dtype=torch.int64)
        places = vision[row : row + 1, first:] - first
        alone = reference(embeds[row : row + 1, first:], own, positions_of(own), places)
        torch.testing.assert_close(both.logits[row], alone.logits[0])


@pytest.mark.parametrize("source", ["previous", "next"])
def test_the_graph_and_the_reference_agree_on_a_short_row(source: Any, traced: Tracer) -> None:
    """Prefill and one step behind it."""
    it = traced("llama")
    schedule = Resolved(it.facts.layers, None, HALF_THEN_TWO_FIFTHS, source=source, query="text")
    client = Client(it.cut(schedule))
    reference = Reference(it.model.model.language_model, it.model.lm_head, schedule)
    mask = torch.tensor([[1] * 9, [0] + [1] * 8])
    vision = torch.tensor([[1, 2, 3, 4, 5], [0, 2, 3, 5, 6]])
    draw = torch.Generator().manual_seed(3)
    cache = None
    for length in (9, 1):
        embeds = torch.randn(2, length, it.model.config.text_config.hidden_size, generator=draw)
        positions = positions_of(mask)[:, -length:]
        wanted = reference(embeds, mask, positions, vision, cache)
        actual = client(
            inputs_embeds=embeds.numpy(),
            attention_mask=mask.numpy(),
            position_ids=positions.numpy(),
            vision_index=vision.numpy(),
        )
        for number, kept in enumerate(wanted.kept):
            assert actual[f"kept.{number}"].tolist() == kept.tolist()
        np.testing.assert_allclose(actual["logits"], wanted.logits.numpy(), atol=2e-5)
        mask, vision, cache = (
            torch.nn.functional.pad(mask, (0, 1), value=1),
            vision[:, :0],
            wanted.cache,
        )
    assert mask.shape == (2, 11)
