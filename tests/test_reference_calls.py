"""The oracle in batches, over several calls, and against transformers' layers pruned by hand."""

import random
from typing import Any

import pytest
import torch
from test_reference import reference, schedule
from tiny_models import IMAGE, PAD, pictures, prompt, tiny_llava
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vtr_export.reference import Reference, Step, embed, pad_batch, positions_of, vision_index_of
from vtr_export.schedule import Cut, Keep, Resolved

CLOSE: dict[str, Any] = {"atol": 5e-5, "rtol": 0.0}
CLEAR = 1e-5  # a margin above this survives another order of summation
OPTIONS = {
    "source": ["previous", "next"],
    "query": ["last", "text"],
    "heads": ["mean", "max"],
    "rank": ["joint", "per_image"],
    "positions": ["original", "repacked"],
    "drop_point": ["between", "inside"],
}


def draw_options(draw: random.Random) -> dict[str, str]:
    options = {name: draw.choice(values) for name, values in OPTIONS.items()}
    if options["source"] == "next":
        options["drop_point"] = "between"
    return options


def start(run: Reference, embeds: Tensor, mask: Tensor, vision: Tensor, **more: Any) -> Step:
    """One call whose positions follow from the mask of the whole sequence."""
    positions = positions_of(mask)[:, -embeds.shape[1] :]
    return run(embeds, mask, positions, vision, **more)


# --- pruned by hand with transformers' own layers ---


def run_layer(decoder: Any, index: int, hidden: Tensor, positions: Tensor) -> Tensor:
    """Layer ``index`` of transformers on one row without pads."""
    length = hidden.shape[1]
    causal = torch.full((length, length), -torch.inf).triu(1)[None, None]
    rotary = decoder.rotary_emb(hidden, positions)
    out: Tensor = decoder.layers[index](hidden, attention_mask=causal, position_embeddings=rotary)
    return out


def shares(decoder: Any, index: int, hidden: Tensor, positions: Tensor) -> Tensor:
    """``[heads, T]``: how layer ``index`` divides its last row's attention."""
    layer = decoder.layers[index]
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    shape = (1, hidden.shape[1], -1, attention.head_dim)
    query = attention.q_proj(normed).view(shape).transpose(1, 2)
    key = attention.k_proj(normed).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *decoder.rotary_emb(hidden, positions))
    group = query.shape[1] // key.shape[1]
    rows = [
        (key[0, head // group] @ query[0, head, -1]) / attention.head_dim**0.5
        for head in range(query.shape[1])
    ]
    return torch.stack(rows).softmax(-1)


@pytest.mark.parametrize("positions", ["original", "repacked"])
@pytest.mark.parametrize(
    ("source", "drop_point"), [("previous", "between"), ("previous", "inside"), ("next", "between")]
)
@torch.no_grad()
def test_it_equals_transformers_layers_pruned_by_hand(
    source: str, positions: str, drop_point: str
) -> None:
    model = tiny_llava(layers=4, text="qwen2")
    decoder = model.model.language_model
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([prompt(generator, 16, 1)])
    embeds, vision = embed(model, ids, torch.ones_like(ids), pictures(model, 1, generator))
    cuts = {1: 9, 3: 4} if source == "previous" else {0: 9, 3: 4}
    options = {"source": source, "positions": positions, "drop_point": drop_point}
    step = start(
        reference(model, cuts, **options), embeds, torch.ones_like(ids), vision, logits="all"
    )
    hidden, place, is_vision = embeds, torch.arange(ids.shape[1])[None], (ids == IMAGE)[0]
    before = hidden, place
    for index in range(4):
        if index in cuts:
            looks = (hidden, place) if source == "next" else before
            score = shares(decoder, index - (source == "previous"), *looks).mean(0)
            ranked = sorted(is_vision.nonzero()[:, 0].tolist(), key=lambda at: -float(score[at]))
            dropped = ranked[cuts[index] :]
            kept = [at for at in range(len(is_vision)) if at not in dropped]
            assert step.kept[list(cuts).index(index)].tolist() == [kept]
            hidden, place, is_vision = hidden[:, kept], place[:, kept], is_vision[kept]
            if positions == "repacked":
                place = torch.arange(len(kept))[None]
        before = hidden, place
        hidden = run_layer(decoder, index, hidden, place)
    logits = model.lm_head(decoder.norm(hidden))
    torch.testing.assert_close(step.logits, logits, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_fp32_whatever_the_weights_are(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(10)
    ids = torch.tensor([prompt(generator, 16, 1)])
    wide, narrow = tiny_llava(layers=2), tiny_llava(layers=2, dtype=dtype)
    inputs = embed(wide, ids, torch.ones_like(ids), pictures(wide, 1, generator))
    expected = start(reference(wide, {1: 4}), inputs[0], torch.ones_like(ids), inputs[1])
    step = start(
        reference(narrow, {1: 4}),
        inputs[0].to(dtype),
        torch.ones_like(ids),
        inputs[1],
        forced=expected.kept,
    )
    assert step.scores[0].dtype == step.logits.dtype == torch.float32
    assert step.cache.keys[1].dtype == dtype
    torch.testing.assert_close(step.scores[0], expected.scores[0], atol=5e-3, rtol=0.0)
    torch.testing.assert_close(step.logits, expected.logits, atol=5e-2, rtol=0.0)
    assert len(set(step.scores[0][0].tolist())) == 16  # not rounded to the weights' dtype


def test_inside_keeps_the_keys_of_its_layer_whole_and_says_the_same() -> None:
    model = tiny_llava(layers=3)
    generator = torch.Generator().manual_seed(4)
    ids = torch.tensor([prompt(generator, 16, 1)])
    inputs = embed(model, ids, torch.ones_like(ids), pictures(model, 1, generator))
    steps = [
        start(
            reference(model, {2: 5}, drop_point=point), inputs[0], torch.ones_like(ids), inputs[1]
        )
        for point in ("between", "inside")
    ]
    lengths = [ids.shape[1], ids.shape[1], ids.shape[1] - 11]
    assert [key.shape[2] for key in steps[1].cache.keys] == lengths
    torch.testing.assert_close(steps[0].logits, steps[1].logits, **CLOSE)


# --- identity ---


@pytest.mark.parametrize("source", ["previous", "next"])
@pytest.mark.parametrize("positions", ["original", "repacked"])
def test_keeping_everything_is_the_uncut_model_to_the_bit(source: str, positions: str) -> None:
    model = tiny_llava(layers=3)
    generator = torch.Generator().manual_seed(5)
    ids, mask = pad_batch([prompt(generator, 16, n) for n in (1, 2, 0)], PAD, IMAGE)
    embeds, vision = embed(model, ids, mask, pictures(model, 3, generator))
    cut = reference(model, {1: 16, 2: 16}, source=source, positions=positions)
    answers = [
        run.generate(model.get_input_embeddings(), embeds, mask, vision, max_new_tokens=5)
        for run in (reference(model, {}), cut)
    ]
    assert torch.equal(answers[0].logits, answers[1].logits)
    for name in ("keys", "values"):
        pairs = zip(*(getattr(answer.cache, name) for answer in answers), strict=True)
        assert all(torch.equal(first, second) for first, second in pairs)
    assert all(
        torch.equal(padding, answers[0].attention_mask) for padding in answers[1].cache.padding
    )


def test_a_prompt_without_images_is_the_uncut_model_to_the_bit() -> None:
    model = tiny_llava(layers=3)
    generator = torch.Generator().manual_seed(6)
    ids, mask = pad_batch([prompt(generator, 16, 0) for _ in range(2)], PAD, IMAGE)
    embeds, vision = embed(model, ids, mask, None)
    assert vision.shape == (2, 0)
    steps = [start(reference(model, cuts), embeds, mask, vision) for cuts in ({}, {1: 4, 2: 0})]
    assert torch.equal(steps[0].logits, steps[1].logits)
    assert all(kept.tolist() == [list(range(ids.shape[1]))] * 2 for kept in steps[1].kept)


# --- batches ---


@pytest.fixture(scope="module")
def small() -> Any:
    return tiny_llava(layers=3, hidden=16, heads=2, kv_heads=1, image=14)  # 4 tokens an image


def words_kept(step: Step, cut: int, row: int) -> list[int]:
    """Real columns of ``row`` that pass ``cut``, counted among its real ones."""
    mask = step.cache.padding[cut][row, -int(step.kept[cut].max()) - 1 :]
    place = positions_of(mask[None])[0]
    return [int(place[at]) for at in step.kept[cut][row].tolist() if mask[at]]


def test_rows_of_a_batch_equal_rows_alone(small: Any) -> None:
    draw, compared = random.Random(7), 0
    embeddings = small.get_input_embeddings()
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        counts = [draw.randint(0, 2) for _ in range(draw.randint(2, 3))]
        rows = [prompt(generator, 4, count) for count in counts]
        images = [pictures(small, count, generator) for count in counts]
        cuts = {1: draw.randint(1, 4), 2: draw.randint(0, 1)}
        run = reference(small, cuts, **draw_options(draw))
        ids, mask = pad_batch(rows, PAD, IMAGE)
        embeds, vision = embed(small, ids, mask, torch.cat(images))
        batch = run.generate(embeddings, embeds, mask, vision, max_new_tokens=2)
        for at, (row, pixels) in enumerate(zip(rows, images, strict=True)):
            alone = torch.tensor([row])
            one = torch.ones_like(alone)
            inputs = embed(small, alone, one, pixels)
            single = run.generate(embeddings, inputs[0], one, inputs[1], max_new_tokens=2)
            if min(float(margin) for margin in single.prefill.margins) < CLEAR:
                continue
            compared += 1
            for cut in range(2):
                assert words_kept(batch.prefill, cut, at) == words_kept(single.prefill, cut, 0)
            torch.testing.assert_close(batch.logits[at, 0], single.logits[0, 0], **CLOSE)
            if batch.tokens[at, 0] == single.tokens[0, 0]:
                torch.testing.assert_close(batch.logits[at, 1], single.logits[0, 1], **CLOSE)
    assert compared > 450


def test_a_row_without_room_for_its_pads_is_refused() -> None:
    is_vision = torch.tensor([[False, True, True], [False, True, False]])
    with pytest.raises(ValueError, match="lacks pads"):
        vision_index_of(is_vision, torch.ones(2, 3))
    columns = vision_index_of(is_vision, torch.tensor([[1, 1, 1], [0, 1, 1]]))
    assert columns.tolist() == [[1, 2], [0, 1]]


# --- several calls ---


def joined(steps: list[Step]) -> list[Tensor]:
    """``kept`` of the one call that says what ``steps`` said one after the other."""
    whole = []
    for cut in range(len(steps[0].kept)):
        past, parts = 0, []
        for step in steps:
            parts.append(step.kept[cut] + past)
            past = step.cache.padding[cut].shape[1]
        whole.append(torch.cat(parts, 1))
    return whole


@pytest.mark.parametrize("seed", range(24))
def test_calls_in_a_row_equal_one_call_with_their_columns(small: Any, seed: int) -> None:
    """Image and question, a second question, a new image for one row, then two decode steps."""
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    options = draw_options(draw)
    run = reference(small, {1: draw.randint(1, 3), 2: draw.randint(0, 1)}, **options)
    turns: list[tuple[Tensor, Tensor, Tensor]] = []
    for counts in ([1, 2], [0, 0], [0, 1], [0, 0], [0, 0]):
        rows = [prompt(generator, 4, count) for count in counts]
        rows = [row[-1:] for row in rows] if len(turns) > 2 else rows
        ids, mask = pad_batch(rows, PAD, IMAGE)
        turns.append((*embed(small, ids, mask, pictures(small, sum(counts), generator)), mask))
    steps: list[Step] = []
    seen = torch.zeros(2, 0, dtype=torch.int64)
    offsets = []
    for embeds, vision, mask in turns:
        offsets.append(vision + seen.shape[1])
        seen = torch.cat((seen, mask), 1)
        cache = steps[-1].cache if steps else None
        steps.append(start(run, embeds, seen, vision, cache=cache))
    texts = [steps[turn] for turn in (1, 3, 4)]
    untouched = [
        (kept, score) for step in texts for kept, score in zip(step.kept, step.scores, strict=True)
    ]
    for kept, score in untouched:
        assert kept.tolist() == [list(range(kept.shape[1]))] * 2
        assert score.shape[1] == 0
    whole = start(
        run,
        torch.cat([turn[0] for turn in turns], 1),
        seen,
        torch.cat(offsets, 1),
        forced=joined(steps),
    )
    torch.testing.assert_close(whole.logits, steps[-1].logits, **CLOSE)
    for ours, theirs in zip(whole.cache.keys, steps[-1].cache.keys, strict=True):
        real = _real(whole, ours)
        torch.testing.assert_close(ours[real], theirs[real], **CLOSE)


def _real(step: Step, keys: Tensor) -> Any:
    """Index of the entries of ``keys`` that are no pads."""
    lengths = {padding.shape[1]: padding for padding in step.cache.padding}
    return lengths[keys.shape[2]][:, None].expand(keys.shape[:3]) == 1


def test_a_new_image_is_ranked_by_itself_but_normalised_over_everything(small: Any) -> None:
    generator = torch.Generator().manual_seed(8)
    run = reference(small, {1: 2})
    first, second = (torch.tensor([prompt(generator, 4, 1)]) for _ in range(2))
    turns = [
        embed(small, ids, torch.ones_like(ids), pictures(small, 1, generator))
        for ids in (first, second)
    ]
    step = start(run, turns[0][0], torch.ones_like(first), turns[0][1])
    mask = torch.ones(1, first.shape[1] + second.shape[1], dtype=torch.int64)
    again = start(run, turns[1][0], mask, turns[1][1], cache=step.cache)
    assert again.kept[0].shape[1] == second.shape[1] - 2
    text = [at for at in range(second.shape[1]) if at not in turns[1][1][0].tolist()]
    assert set(text) < set(again.kept[0][0].tolist())
    both = torch.cat((turns[0][1], turns[1][1] + first.shape[1]), 1)
    whole = start(run, torch.cat((turns[0][0], turns[1][0]), 1), mask, both)
    torch.testing.assert_close(again.scores[0], whole.scores[0][:, 4:], **CLOSE)


def test_a_cut_of_a_varying_number_of_tokens_rounds_as_named() -> None:
    model = tiny_llava(layers=2, hidden=16, heads=2, kv_heads=1, image=14)
    embeds = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(9))
    for rounding, kept in (("floor", 2), ("ceil", 3)):
        cut = Cut(1, Keep(1, 2, rounding))  # type: ignore[arg-type]
        run = Reference(model.model.language_model, model.lm_head, Resolved(2, None, (cut,)))
        step = start(run, embeds, torch.ones(1, 8, dtype=torch.int64), torch.arange(1, 6)[None])
        assert step.kept[0].shape[1] == 3 + kept


def test_a_schedule_for_another_depth_is_refused() -> None:
    model = tiny_llava(layers=2)
    with pytest.raises(ValueError, match="layers"):
        Reference(model.model.language_model, nn.Identity(), schedule(3, {1: 2}))
