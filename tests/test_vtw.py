"""VTW's rule for K, on drawn curves and in a real decoder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import tiny

from vtr_export.errors import InputError
from vtr_export.families import read_facts
from vtr_export.search.candidate import Candidate, Space
from vtr_export.search.vtw import choose_k

LAYERS, VISION, WIDTH = 8, 4, 10
CONFIG = tiny(text={"num_hidden_layers": LAYERS})
SPACE = Space(read_facts(CONFIG, "config.json"))


@dataclass(frozen=True)
class Measured:
    kl: float | None


def withdrawn_at(candidate: Candidate) -> int:
    """The layer; a candidate that does anything else fails."""
    layer = candidate.keeps.index(0)
    assert candidate.keeps == (VISION,) * layer + (0,) * (LAYERS - layer)
    return layer


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=LAYERS, max_size=LAYERS),
    st.floats(0, 1),
    st.integers(1, LAYERS - 1),
)
def test_the_first_layer_that_is_good_enough_is_chosen(
    curve: list[float], eta: float, first: int
) -> None:
    asked: list[int] = []

    def measure(candidates: Sequence[Candidate]) -> list[Measured]:
        asked.extend(map(withdrawn_at, candidates))
        return [Measured(curve[withdrawn_at(candidate)]) for candidate in candidates]

    good = [layer for layer in range(first, LAYERS) if curve[layer] <= eta]
    chosen = choose_k(measure, SPACE, eta, first)
    assert chosen == (good[0] if good else None)
    last = LAYERS - 1 if chosen is None else chosen
    assert asked == list(range(first, last + 1))  # no layer beyond the answer costs anything


@pytest.mark.parametrize(
    ("eta", "first"), [(math.nan, 5), (-0.1, 5), (math.inf, 5), (0.1, 0), (0.1, LAYERS)]
)
def test_what_cannot_be_is_refused(eta: float, first: int) -> None:
    with pytest.raises(InputError) as caught:
        choose_k(lambda _: [Measured(0.0)], SPACE, eta, first)
    assert caught.value.hint


def test_a_shallow_model_has_no_layer_to_start_from() -> None:
    shallow = Space(replace(SPACE.facts, layers=4))
    with pytest.raises(InputError, match="5 of 4"):
        choose_k(lambda _: [Measured(0.0)], shallow, 0.1)


def test_in_a_real_decoder_it_is_the_layer_that_brute_force_finds() -> None:
    """With the paper's own KL, of the last prompt token's logits."""
    torch = pytest.importorskip("torch", reason="the decoder is one of it")
    transformers = pytest.importorskip("transformers", reason="its decoder is pruned")
    from vtr_export.reference.decoder import Reference

    torch.manual_seed(0)
    config = transformers.LlavaConfig.from_dict(CONFIG)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for weight in model.model.language_model.parameters():
        weight.data *= 8  # a fresh model hardly looks at anything
    prompts = torch.randn(6, WIDTH, SPACE.facts.hidden)
    mask = torch.ones(6, WIDTH, dtype=torch.int64)
    positions = torch.arange(WIDTH).expand(6, WIDTH)
    index = torch.arange(VISION).expand(6, VISION)

    def log_probabilities(candidate: Candidate) -> Any:
        schedule = candidate.resolve(SPACE.facts)
        step = Reference(model.model.language_model, model.lm_head, schedule)(
            prompts, mask, positions, index
        )
        return step.logits[:, -1].double().log_softmax(-1)

    def measure(candidates: Sequence[Candidate]) -> list[Measured]:
        full = log_probabilities(SPACE.unpruned())
        done = map(log_probabilities, candidates)
        return [Measured(float((full.exp() * (full - one)).sum(-1).mean())) for one in done]

    def brute_force(layer: int) -> float:
        """Text alone above ``layer``: transformers' own layers, their keys cut by hand."""
        decoder = model.model.language_model
        with torch.no_grad():
            hidden, rows = prompts, positions
            for i, block in enumerate(decoder.layers):
                if i == layer:
                    hidden, rows = hidden[:, VISION:], rows[:, VISION:]
                bias = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)[None, None]
                angles = decoder.rotary_emb(hidden, rows)
                hidden = block(hidden, attention_mask=bias, position_embeddings=angles)
            logits = model.lm_head(decoder.norm(hidden[:, -1]))
        full = log_probabilities(SPACE.unpruned())
        one = logits.double().log_softmax(-1)
        return float((full.exp() * (full - one)).sum(-1).mean())

    curve = [brute_force(layer) for layer in range(1, LAYERS)]
    assert max(curve) > 2 * min(curve) > 0
    for eta in curve:
        first = next(i + 1 for i, kl in enumerate(curve) if kl <= eta * (1 + 1e-3))
        assert choose_k(measure, SPACE, eta * (1 + 1e-3), 1) == first
    assert choose_k(measure, SPACE, min(curve) / 2, 1) is None
