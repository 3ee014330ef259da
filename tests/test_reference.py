"""The oracle against transformers, against numbers worked out on paper, and against itself."""

import math
from typing import Any

import pytest
import torch
from tiny_models import IMAGE, PAD, pictures, prompt, tiny_llava
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtr_export.reference import Reference, Step, embed, pad_batch, positions_of
from vtr_export.schedule import Cut, Keep, Resolved

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tied": True},
    "qwen2": {"text": "qwen2"},
    "mistral": {"text": "mistral", "kv_heads": 4},
    "siglip": {"tower": "siglip"},
    "fp16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def schedule(layers: int, cuts: dict[int, int], tokens: int = 16, **options: str) -> Resolved:
    chosen = {
        "source": "previous",
        "query": "last",
        "heads": "mean",
        "rank": "joint",
        "positions": "original",
        "drop_point": "between",
    } | options
    listed = tuple(Cut(layer, Keep(keep, tokens)) for layer, keep in cuts.items())
    return Resolved(layers=layers, tokens_per_image=tokens, cuts=listed, **chosen)  # type: ignore[arg-type]


def reference(model: Any, cuts: dict[int, int], **options: str) -> Reference:
    decoder = model.model.language_model
    tokens = model.config.image_seq_length
    return Reference(decoder, model.lm_head, schedule(len(decoder.layers), cuts, tokens, **options))


# --- without cuts it is transformers' own model ---


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_without_cuts_it_equals_transformers(variant: dict[str, Any]) -> None:
    model = tiny_llava(layers=3, **variant)
    generator = torch.Generator().manual_seed(1)
    rows = [prompt(generator, 16, images) for images in (1, 0, 2)]
    ids, mask = pad_batch(rows, PAD, IMAGE)
    pixels = pictures(model, 3, generator)
    embeds, vision = embed(model, ids, mask, pixels)
    ours = reference(model, {})
    step = ours(embeds, mask, positions_of(mask), vision, logits="all")
    theirs = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions_of(mask),
        pixel_values=pixels,
        use_cache=True,
    )
    close: dict[str, Any] = {"atol": TOLERANCE[model.dtype], "rtol": 0.0}
    torch.testing.assert_close(step.logits[mask == 1], theirs.logits[mask == 1].float(), **close)
    for _ in range(8):
        token = theirs.logits[:, -1:].argmax(-1)
        mask = nn.functional.pad(mask, (0, 1), value=1)
        positions = positions_of(mask)[:, -1:]
        step = ours(model.get_input_embeddings()(token), mask, positions, vision[:, :0], step.cache)
        theirs = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=theirs.past_key_values,
        )
        torch.testing.assert_close(step.logits, theirs.logits.float(), **close)


@torch.no_grad()
def test_generate_without_cuts_equals_transformers_generate() -> None:
    model = tiny_llava(layers=2)
    generator = torch.Generator().manual_seed(2)
    ids, mask = pad_batch([prompt(generator, 16, 1), prompt(generator, 16, 2)], PAD, IMAGE)
    pixels = pictures(model, 3, generator)
    theirs = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=12, do_sample=False
    )[:, ids.shape[1] :]
    eos = int(theirs[0, 5])  # row 0 ends here or earlier, the other goes on
    ours = reference(model, {})
    inputs = embed(model, ids, mask, pixels)
    answer = ours.generate(
        model.get_input_embeddings(), inputs[0], mask, inputs[1], max_new_tokens=12, eos=[eos]
    )
    for mine, full in zip(answer.tokens.tolist(), theirs.tolist(), strict=True):
        end = full.index(eos) + 1 if eos in full else len(full)
        assert mine == (full[:end] + [eos] * (len(mine) - end))[: len(mine)]


# --- a toy whose scores are known on paper ---


class ToyAttention(nn.Module):
    """Head h of token x asks with x[2h] and is asked by x[2h + 1]: logit = product of the two."""

    def __init__(self, heads: int, output: float, config: PretrainedConfig) -> None:
        super().__init__()
        self.heads, self.output, self.config = heads, output, config

    def forward(self, hidden: Tensor, mask: Tensor, past: Any) -> Tensor:
        pairs = hidden.unflatten(-1, (self.heads, 2)).transpose(1, 2)
        query, none = pairs * torch.tensor([1.0, 0.0]), torch.zeros(())
        key = torch.stack((pairs[..., 1], none.expand_as(pairs[..., 1])), -1)
        key, value = past.update(key, pairs, 0)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return self.output * attend(self, query, key, value, mask, scaling=1.0)[0].flatten(2)


class ToyLayer(nn.Module):
    def __init__(self, heads: int, output: float, config: PretrainedConfig) -> None:
        super().__init__()
        self.self_attn = ToyAttention(heads, output, config)
        self.seen = list[list[list[int]]]()

    def forward(
        self, hidden: Tensor, attention_mask: Tensor, past_key_values: Any, position_ids: Tensor
    ) -> Tensor:
        self.seen.append(position_ids.tolist())
        return hidden + self.self_attn(hidden, attention_mask, past_key_values)


class ToyDecoder(nn.Module):
    """Layers that leave the residual stream alone (output 0); positions turn nothing."""

    def __init__(self, layers: int, heads: int = 1, output: float = 0.0) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.layers = nn.ModuleList(ToyLayer(heads, output, self.config) for _ in range(layers))
        self.norm = nn.Identity()

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any,
        use_cache: bool,
    ) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds, attention_mask, past_key_values, position_ids)
        return inputs_embeds


def weigh(*weights: float, ask: float = 1.0) -> Tensor:
    """One-head tokens with these weights: exp(logit) of a row that asks with 1."""
    return torch.tensor([[ask, math.log(weight)] for weight in weights])


def toy(
    embeds: Tensor,
    vision: list[list[int]],
    cuts: dict[int, int],
    mask: list[list[int]] | None = None,
    decoder: ToyDecoder | None = None,
    tokens: int = 4,
    **options: str,
) -> Step:
    embeds = embeds if embeds.ndim == 3 else embeds[None]
    decoder = decoder or ToyDecoder(3, embeds.shape[-1] // 2)
    run = Reference(decoder, nn.Identity(), schedule(len(decoder.layers), cuts, tokens, **options))
    attend = torch.tensor(mask) if mask else torch.ones(embeds.shape[:2], dtype=torch.int64)
    return run(embeds, attend, positions_of(attend), torch.tensor(vision))


@pytest.mark.parametrize("source", ["previous", "next"])
def test_the_best_tokens_stay_and_ties_go_to_the_lower_index(source: str) -> None:
    step = toy(weigh(1, 2, 1, 3, 2, 1), [[1, 2, 3, 4]], {1: 2}, source=source)
    torch.testing.assert_close(step.scores[0], torch.tensor([[2, 1, 3, 2]]) / 10)
    assert step.kept[0].tolist() == [[0, 1, 3, 5]]
    assert step.kept_vision[0].tolist() == [[1, 2]]
    assert step.margins[0].item() == 0.0
    assert [key.shape[2] for key in step.cache.keys] == [6, 4, 4]


def test_three_hundred_equal_tokens_keep_their_first_hundred() -> None:
    step = toy(weigh(*[1] * 302), [list(range(1, 301))], {1: 100}, tokens=300)
    assert step.kept[0].tolist() == [[*range(101), 301]]


def test_a_second_cut_counts_from_the_first_ones_survivors() -> None:
    step = toy(weigh(1, 2, 1, 3, 2, 1), [[1, 2, 3, 4]], {1: 2, 2: 1})
    torch.testing.assert_close(step.scores[1], torch.tensor([[2, 3]]) / 7)
    assert step.kept[1].tolist() == [[0, 2, 3]]
    assert step.kept_vision[1].tolist() == [[1]]
    torch.testing.assert_close(step.margins[1], torch.tensor([1 / 7]))


def test_the_normaliser_counts_text_and_causality() -> None:
    decoder = ToyDecoder(2)
    step = toy(weigh(5, 1, 7, 2, 3), [[1, 3]], {1: 1}, decoder=decoder, tokens=2)
    torch.testing.assert_close(step.scores[0], torch.tensor([[1, 2]]) / 18)
    assert step.kept[0].tolist() == [[0, 2, 3, 4]]


def test_the_output_of_a_pruned_layer_on_paper() -> None:
    embeds = weigh(1, 2, 1, 3, 2, 1)
    step = toy(embeds, [[1, 2, 3, 4]], {1: 2}, decoder=ToyDecoder(2, output=1.0))
    first = []
    for row in range(6):
        weights = [math.exp(float(embeds[row, 0] * embeds[key, 1])) for key in range(row + 1)]
        mixed = sum(w * embeds[key] for key, w in enumerate(weights)) / sum(weights)
        first.append(embeds[row] + mixed)
    weights = [math.exp(float(first[5][0] * first[key][1])) for key in (0, 1, 3, 5)]
    mixed = sum(w * first[key] for key, w in zip((0, 1, 3, 5), weights, strict=True)) / sum(weights)
    torch.testing.assert_close(step.logits[0, 0], first[5] + mixed)


def test_text_rows_vote_together() -> None:
    """Last row: 1 : 4 of 6 and 5 seen. The row before asks for the reciprocal of the weights."""
    embeds = torch.cat((weigh(9, ask=-1), weigh(1, 4), weigh(1, ask=-1), weigh(1)))
    last = toy(embeds, [[1, 2]], {1: 1}, tokens=2)
    text = toy(embeds, [[1, 2]], {1: 1}, tokens=2, query="text")
    torch.testing.assert_close(last.scores[0], torch.tensor([[1, 4]]) / 16)
    before = 1 / 9 + 1 + 1 / 4 + 1
    expected = [(1 / 16 + 1 / before) / 2, (4 / 16 + 0.25 / before) / 2]
    torch.testing.assert_close(text.scores[0], torch.tensor([expected]))
    assert last.kept[0].tolist() == [[0, 2, 3, 4]]
    assert text.kept[0].tolist() == [[0, 1, 3, 4]]


def test_a_last_row_that_is_vision_asks_itself() -> None:
    step = toy(weigh(1, 2, 5), [[1, 2]], {1: 1}, tokens=2, query="text")
    torch.testing.assert_close(step.scores[0], torch.tensor([[2, 5]]) / 8)


def test_heads_agree_or_the_loudest_wins() -> None:
    heads = [1, 6, 3, 1], [5, 1, 6, 1]  # weights of text, a, b, last in either head
    embeds = torch.cat([weigh(*weights) for weights in heads], 1)
    mean = toy(embeds, [[1, 2]], {1: 1}, tokens=2)
    loudest = toy(embeds, [[1, 2]], {1: 1}, tokens=2, heads="max")
    torch.testing.assert_close(
        mean.scores[0], torch.tensor([[(6 / 11 + 1 / 13) / 2, (3 / 11 + 6 / 13) / 2]])
    )
    torch.testing.assert_close(loudest.scores[0], torch.tensor([[6 / 11, 6 / 13]]))
    assert mean.kept[0].tolist() == [[0, 2, 3]]
    assert loudest.kept[0].tolist() == [[0, 1, 3]]


def test_each_row_has_its_own_budget_and_pads_fill_the_width() -> None:
    """Row 0: two images of two tokens; row 1: one, so two of its pads stand in."""
    embeds = torch.stack([weigh(1, 5, 2, 6, 7, 1), weigh(9, 9, 9, 3, 4, 1)])
    mask = [[1] * 6, [0, 0, 0, 1, 1, 1]]
    step = toy(embeds, [[1, 2, 3, 4], [0, 1, 3, 4]], {1: 1}, mask, tokens=2)
    torch.testing.assert_close(step.scores[0][1], torch.tensor([-2, -2, 3 / 8, 4 / 8]))
    assert step.kept[0].tolist() == [[0, 3, 4, 5], [0, 2, 4, 5]]
    assert step.kept_vision[0].tolist() == [[1, 2], [0, 2]]
    assert step.cache.padding[1].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    torch.testing.assert_close(step.margins[0], torch.tensor([1 / 22, 1 / 8]))


def test_per_image_gives_equal_shares() -> None:
    embeds = torch.stack([weigh(1, 5, 2, 6, 7, 1), weigh(9, 9, 9, 3, 4, 1)])
    mask = [[1] * 6, [0, 0, 0, 1, 1, 1]]
    vision = [[1, 2, 3, 4], [0, 1, 3, 4]]
    step = toy(embeds, vision, {1: 1}, mask, tokens=2, rank="per_image")
    assert step.kept[0].tolist() == [[0, 1, 4, 5], [0, 2, 4, 5]]
    torch.testing.assert_close(step.margins[0], torch.tensor([1 / 22, 1 / 8]))


def test_not_a_number_ranks_below_all_numbers_and_above_pads() -> None:
    embeds = torch.stack([weigh(1, 5, 2, 6, 7, 1), weigh(9, 9, 9, 3, 4, 1)])
    embeds[1, 4, 1] = torch.nan
    mask = [[1] * 6, [0, 0, 0, 1, 1, 1]]
    step = toy(embeds, [[1, 2, 3, 4], [0, 1, 3, 4]], {1: 1}, mask, tokens=2)
    assert step.scores[0][1].tolist() == [-2, -2, -1, -1]
    assert step.kept[0].tolist() == [[0, 3, 4, 5], [0, 2, 3, 5]]


def test_nothing_kept_and_everything_kept_have_no_margin() -> None:
    embeds, vision = weigh(1, 2, 1, 3, 2, 1), [[1, 2, 3, 4]]
    nothing = toy(embeds, vision, {1: 0})
    assert nothing.kept[0].tolist() == [[0, 5]]
    assert nothing.kept_vision[0].shape == (1, 0)
    assert nothing.margins[0].item() == math.inf
    everything = toy(embeds, vision, {1: 4})
    assert everything.kept[0].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert everything.margins[0].item() == math.inf


@pytest.mark.parametrize(
    ("positions", "prefill", "decode"),
    [("original", [0, 1, 3, 5], [6]), ("repacked", [0, 1, 2, 3], [4])],
)
def test_positions_travel_or_close_ranks(
    positions: str, prefill: list[int], decode: list[int]
) -> None:
    decoder = ToyDecoder(2)
    run = Reference(decoder, nn.Identity(), schedule(2, {1: 2}, 4, positions=positions))
    embeds, mask = weigh(1, 2, 1, 3, 2, 1)[None], torch.ones(1, 6, dtype=torch.int64)
    step = run(embeds, mask, positions_of(mask), torch.tensor([[1, 2, 3, 4]]))
    none, longer = torch.zeros(1, 0, dtype=torch.int64), torch.ones(1, 7, dtype=torch.int64)
    run(embeds[:, :1], longer, torch.tensor([[6]]), none, step.cache)
    seen = [layer.seen for layer in decoder.layers]
    assert seen == [[[[0, 1, 2, 3, 4, 5]], [[6]]], [[prefill], [decode]]]


def test_forced_columns_replace_the_choice_but_not_the_score() -> None:
    decoder = ToyDecoder(2)
    run = Reference(decoder, nn.Identity(), schedule(2, {1: 2}, 4))
    embeds, mask = weigh(1, 2, 1, 3, 2, 1)[None], torch.ones(1, 6, dtype=torch.int64)
    forced = torch.tensor([[0, 2, 4, 5]])
    index = torch.tensor([[1, 2, 3, 4]])
    step = run(embeds, mask, positions_of(mask), index, forced=[forced])
    assert torch.equal(step.kept[0], forced)
    assert step.kept_vision[0].tolist() == [[1, 2]]
    torch.testing.assert_close(step.margins[0], torch.tensor([-0.2]))  # 0.1 kept, 0.3 dropped
