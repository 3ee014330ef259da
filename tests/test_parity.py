"""Traced graphs with cuts in ONNX Runtime against the reference: every variant, call after call."""

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from cut_graphs import Array, Client, Traced, Tracer, serialized
from tiny_models import IMAGE, PAD, pictures, prompt
from torch import Tensor

from vtr_export.passes.widen import Widen
from vtr_export.reference import Reference, Step, embed, pad_batch, positions_of, vision_index_of
from vtr_export.schedule import Cut, Keep, Resolved
from vtr_export.schedule_document import Correlate, Recycle

GATE = 1e-4  # largest difference of fp32 logits, keys and values
CLEAR = 1e-5  # a margin above this survives another order of summation
RECYCLE = Recycle(share=Fraction(4, 5), each=3)
SELF_CROSS = {"rule": "self_cross", "query": "text", "heads": "max"}
REDUNDANCY = {"rule": "redundancy", "query": "text"}
MERGED: dict[str, Any] = {"drop_point": "attended", "merge": Correlate()}
CASES: dict[str, tuple[dict[int, int], dict[str, Any]]] = {
    "last": ({1: 8, 3: 3}, {}),
    "text": ({2: 5}, {"query": "text"}),
    "max": ({1: 8, 2: 0}, {"heads": "max"}),
    "next": ({0: 9, 2: 4}, {"source": "next"}),
    "next_text_max": ({1: 9, 2: 4}, {"source": "next", "query": "text", "heads": "max"}),
    "inside": ({1: 8, 3: 3}, {"drop_point": "inside"}),
    "inside_text": ({1: 8, 2: 3}, {"drop_point": "inside", "query": "text"}),
    "inside_repacked": ({1: 8, 3: 3}, {"drop_point": "inside", "positions": "repacked"}),
    "repacked": ({1: 8, 3: 3}, {"positions": "repacked"}),
    "repacked_next": ({1: 8, 2: 3}, {"positions": "repacked", "source": "next"}),
    "per_image": ({1: 8, 3: 3}, {"rank": "per_image"}),
    "per_image_next": ({0: 8, 1: 3, 2: 1}, {"rank": "per_image", "source": "next"}),
    "raters": ({1: 8, 3: 3}, {"query": "raters"}),
    "raters_next": ({0: 9, 2: 4}, {"query": "raters", "source": "next"}),
    "recycled": ({1: 8, 3: 3}, {"merge": RECYCLE}),
    "recycled_next": ({0: 8, 2: 3}, {"merge": RECYCLE, "source": "next"}),
    "sparsevlm": ({1: 8, 3: 3}, {"query": "raters", "merge": RECYCLE, "positions": "repacked"}),
    "self_cross": ({1: 8, 3: 3}, {**SELF_CROSS, "drop_point": "inside"}),
    "redundancy": ({1: 8, 3: 3}, {**REDUNDANCY, "drop_point": "attended"}),
    "correlate": ({1: 8, 3: 3}, {**REDUNDANCY, **MERGED, "positions": "repacked"}),
    "correlate_between": ({1: 8, 2: 0}, {"merge": Correlate(nearest=1)}),
    "uncut": ({}, {}),
}
SHORT = ("qwen2", "four_tokens")  # variants that get one schedule each


class Pair:
    """A graph and its reference, given the same calls."""

    def __init__(self, reference: Reference, client: Client) -> None:
        self.reference, self.client = reference, client
        self.seen = torch.zeros(0, 0, dtype=torch.int64)
        self.cache: Any = None

    def __call__(self, embeds: Tensor, mask: Tensor, vision: Tensor) -> Step:
        """One more call; ``mask`` [B,S] is of its own columns."""
        self.seen = torch.cat((self.seen.reshape(len(mask), -1), mask), 1)
        positions = positions_of(self.seen)[:, -mask.shape[1] :]
        step = self.reference(embeds, self.seen, positions, vision, self.cache)
        outputs = self.client(**feeds(embeds, self.seen, positions, vision))
        assert min((float(m.min()) for m in step.margins), default=1.0) > CLEAR
        compare(step, outputs)
        self.cache = step.cache
        return step


def feeds(embeds: Tensor, seen: Tensor, positions: Tensor, vision: Tensor) -> dict[str, Array]:
    return {
        "inputs_embeds": embeds.numpy(),
        "attention_mask": seen.numpy(),
        "position_ids": positions.numpy(),
        "vision_index": vision.numpy(),
    }


def compare(step: Step, outputs: dict[str, Array]) -> None:
    """Same tokens survive, and every tensor that leaves the call is as it should be."""
    for number, kept in enumerate(step.kept):
        assert outputs[f"kept.{number}"].tolist() == kept.tolist()
        assert outputs[f"present_mask.{number}"].tolist() == step.cache.padding[number + 1].tolist()
    assert_close(outputs["logits"], step.logits)
    for part, states in (("key", step.cache.keys), ("value", step.cache.values)):
        for layer, state in enumerate(states):
            assert state is not None
            assert_close(outputs[f"present.{layer}.{part}"], state)


def assert_close(actual: Array, expected: Tensor) -> None:
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=GATE)


def pair(tiny: Traced, schedule: Resolved) -> Pair:
    reference = Reference(tiny.model.model.language_model, tiny.model.lm_head, schedule)
    return Pair(reference, Client(tiny.cut(schedule)))


Turn = tuple[Tensor, Tensor, Tensor]


def turn(tiny: Traced, counts: Sequence[int], generator: torch.Generator) -> Turn:
    """Left-padded prompts with ``counts`` images: embeddings, mask, vision index."""
    rows = [prompt(generator, tiny.tokens, count) for count in counts]
    ids, mask = pad_batch(rows, PAD, IMAGE)
    embeds, vision = embed(tiny.model, ids, mask, pictures(tiny.model, sum(counts), generator))
    return embeds, mask, vision


def words(tiny: Traced, batch: int, count: int, generator: torch.Generator) -> Turn:
    """``count`` tokens for every row, none of them an image's."""
    ids = torch.randint(5, 45, (batch, count), generator=generator)
    embeds = tiny.model.get_input_embeddings()(ids).detach()
    return embeds, torch.ones_like(ids), ids[:, :0]


def converse(tiny: Traced, schedule: Resolved, seed: int) -> None:
    """Images and questions, an answer, a new image for some, a question about what was seen."""
    generator = torch.Generator().manual_seed(seed)
    both = pair(tiny, schedule)
    both(*turn(tiny, [1, 2, 0, 2], generator))
    for count in (1, 1):
        both(*words(tiny, 4, count, generator))
    both(*turn(tiny, [1, 0, 2, 0], generator))
    for count in (1, 5, 1):
        both(*words(tiny, 4, count, generator))


@pytest.mark.parametrize("case", CASES)
def test_a_conversation_of_a_mixed_batch_equals_the_reference(case: str, traced: Tracer) -> None:
    tiny = traced("llama")
    cuts, options = CASES[case]
    converse(tiny, tiny.schedule(cuts, **options), seed=1)


@pytest.mark.parametrize("variant", SHORT)
def test_every_kind_of_checkpoint_equals_the_reference(variant: str, traced: Tracer) -> None:
    tiny = traced(variant)
    converse(tiny, tiny.schedule({1: 3}, query="text"), seed=2)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "four_tokens"])
def test_images_and_words_become_the_same_embeddings(variant: str, traced: Tracer) -> None:
    tiny = traced(variant)
    generator = torch.Generator().manual_seed(3)
    pixels, ids = pictures(tiny.model, 3, generator), torch.arange(12).reshape(3, 4)
    with torch.no_grad():
        features = torch.stack(list(tiny.model.get_image_features(pixels).pooler_output))
        words = tiny.model.get_input_embeddings()(ids)
    vision = session(tiny.graphs.vision_encoder).run(None, {"pixel_values": pixels.numpy()})
    assert_close(vision[0], features)
    table = session(tiny.graphs.embed_tokens).run(None, {"input_ids": ids.numpy()})
    assert (table[0] == words.numpy()).all()


def session(model: Any) -> Any:
    return Client(serialized(model.clone())).session


# --- many small batches against single rows ---

SINGLE: dict[str, tuple[dict[int, int], dict[str, Any]]] = {
    "last": ({1: 3, 2: 1}, {}),
    "text": ({1: 2, 2: 1}, {"query": "text", "positions": "repacked"}),
    "next": ({0: 3, 2: 0}, {"source": "next", "heads": "max"}),
    "sparsevlm": ({1: 2, 2: 1}, {"query": "raters", "merge": RECYCLE, "positions": "repacked"}),
    "per_image": ({1: 2, 2: 1}, {"rank": "per_image", "drop_point": "inside"}),
    "correlate": ({1: 3, 2: 1}, {**REDUNDANCY, **MERGED, "rank": "per_image"}),
}


@pytest.mark.parametrize("case", SINGLE)
def test_fifty_batches_equal_the_reference_row_by_row(case: str, traced: Tracer) -> None:
    tiny, draw = traced("four_tokens"), random.Random(case)
    cuts, options = SINGLE[case]
    schedule = tiny.schedule(cuts, **options)
    both, compared = pair(tiny, schedule), 0
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        counts = [draw.randint(0, 2) for _ in range(draw.randint(2, 3))]
        first = turn(tiny, counts, generator)
        second = words(tiny, len(counts), 1, generator)
        compared += check_rows(both, [first, second])
    assert compared > 100


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_shares_of_any_number_of_tokens_equal_the_reference_row_by_row(
    rounding: Any, traced: Tracer
) -> None:
    """No fixed number of tokens an image: each row's own count is rounded.

    At one cut: see vtr_export/passes/README.md for what several leave open.
    """
    tiny, draw = traced("four_tokens"), random.Random(rounding)
    cuts = (Cut(1, Keep(2, 5, rounding)),)
    both, compared = pair(tiny, Resolved(tiny.facts.layers, None, cuts)), 0
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        counts = [draw.randint(0, 6) for _ in range(draw.randint(2, 3))]
        compared += check_rows(both, [scattered(tiny, counts, draw, generator)])
    assert compared > 100


def scattered(
    tiny: Traced, counts: Sequence[int], draw: random.Random, generator: torch.Generator
) -> Turn:
    """Rows of up to four words with ``counts`` vision tokens anywhere before the last."""
    text = [draw.randint(1, 4) for _ in counts]
    length = max(text) + max(counts)
    mask, is_vision = (torch.zeros(len(counts), length, dtype=torch.int64) for _ in range(2))
    for row, (words, count) in enumerate(zip(text, counts, strict=True)):
        mask[row, length - words - count :] = 1
        is_vision[row, draw.sample(range(length - words - count, length - 1), count)] = 1
    embeds = torch.randn(len(counts), length, tiny.facts.hidden, generator=generator)
    return embeds, mask, vision_index_of(is_vision == 1, mask)


def check_rows(both: Pair, turns: Sequence[Turn]) -> int:
    """Run ``turns`` in one batch and each row alone; the number of rows that were compared."""
    both.client.forget()
    seen, batch = turns[0][1][:, :0], []
    for embeds, mask, vision in turns:
        seen = torch.cat((seen, mask), 1)
        positions = positions_of(seen)[:, -mask.shape[1] :]
        batch.append(both.client(**feeds(embeds, seen, positions, vision)))
    return sum(check_row(both.reference, turns, batch, row) for row in range(len(seen)))


def check_row(
    reference: Reference, turns: Sequence[Turn], batch: Sequence[dict[str, Array]], row: int
) -> bool:
    """Compare one row with the reference that sees nothing else; False if a cut is undecided."""
    cache, seen = None, torch.zeros(1, 0, dtype=torch.int64)
    for (embeds, mask, vision), outputs in zip(turns, batch, strict=True):
        real = mask[row] == 1
        columns = [int(at) for at in vision[row] if mask[row, at]]
        pads = int((~real).sum())
        seen = torch.cat((seen, torch.ones(1, int(real.sum()), dtype=torch.int64)), 1)
        positions = positions_of(seen)[:, -int(real.sum()) :]
        own = torch.tensor([columns], dtype=torch.int64) - pads
        step = reference(embeds[row : row + 1, real], seen, positions, own, cache)
        if min(float(margin) for margin in step.margins) < CLEAR:
            return False
        cache = step.cache
        last = outputs[f"present_mask.{len(step.kept) - 1}"][row]
        assert int(last.sum()) == cache.padding[-1].shape[1]
        assert_close(outputs["logits"][row], step.logits[0])
        keys = outputs[f"present.{len(cache.keys) - 1}.key"][row][:, last == 1]
        assert cache.keys[-1] is not None
        assert_close(keys, cache.keys[-1][0])
    return True


# --- tunable ---


@pytest.mark.parametrize("options", [{}, {"rank": "per_image", "source": "next", "query": "text"}])
def test_a_tunable_budget_equals_the_frozen_one_to_the_bit(
    options: dict[str, str], traced: Tracer
) -> None:
    tiny = traced("llama")
    tunable = Client(tiny.cut(tiny.schedule({1: 5, 2: 5}, **options), tunable=True))
    for keeps in ((8, 3), (16, 0)):
        frozen = Client(tiny.cut(tiny.schedule({1: keeps[0], 2: keeps[1]}, **options)))
        tunable.forget()
        first = calls(tiny, frozen, {})
        second = calls(tiny, tunable, {"keep": np.array(keeps)})
        for expected, actual in zip(first, second, strict=True):
            assert expected.keys() == actual.keys()
            assert all((expected[name] == actual[name]).all() for name in expected)


def calls(tiny: Traced, client: Client, also: dict[str, Array]) -> list[dict[str, Array]]:
    """A prefill and one decode step."""
    generator = torch.Generator().manual_seed(5)
    seen, outputs = torch.zeros(3, 0, dtype=torch.int64), []
    for embeds, mask, vision in (
        turn(tiny, [2, 1, 0], generator),
        words(tiny, 3, 1, generator),
    ):
        seen = torch.cat((seen, mask), 1)
        positions = positions_of(seen)[:, -mask.shape[1] :]
        outputs.append(client(**feeds(embeds, seen, positions, vision), **also))
    return outputs


# --- keep everything ---

WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "last": ("llama", {}),
    "text": ("llama", {"query": "text", "heads": "max"}),
    "next": ("llama", {"source": "next"}),
    "inside": ("llama", {"drop_point": "inside"}),
    "per_image": ("llama", {"rank": "per_image"}),
    "repacked": ("llama", {"positions": "repacked"}),
    "sparsevlm": ("llama", {"query": "raters", "merge": RECYCLE, "positions": "repacked"}),
    "redundancy": ("llama", REDUNDANCY | {"drop_point": "attended"}),
    "correlate": ("llama", SELF_CROSS | MERGED),
    "qwen2": ("qwen2", {}),
    "fp16": ("fp16", {}),
}


class Twin(Client):
    """The fp32 twin: fp16 as such is rounded at a cut and not between layers on this runtime."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__(Widen()(model).model)

    def __call__(self, **feeds: Array) -> dict[str, Array]:
        wide = {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in feeds.items()}
        return super().__call__(**wide)


@pytest.mark.parametrize("case", WHOLE)
def test_cuts_that_keep_everything_change_no_bit(case: str, traced: Tracer) -> None:
    """Logits, keys and values, of a mixed batch's prefill and of a decode step."""
    variant, options = WHOLE[case]
    tiny, client = traced(variant), Twin if variant == "fp16" else Client
    uncut = client(tiny.cut(tiny.schedule({})))
    whole = client(tiny.cut(tiny.schedule({1: tiny.tokens, 2: tiny.tokens}, **options)))
    assert any(name.startswith("kept.") for name in whole.outputs)
    pairs = zip(calls(tiny, uncut, {}), calls(tiny, whole, {}), strict=True)
    for expected, actual in pairs:
        assert len(expected) == 1 + 2 * tiny.facts.layers
        for name, array in expected.items():
            assert array.tobytes() == actual[name].tobytes(), name
