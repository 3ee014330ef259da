"""Evaluations on the reference against each question asked alone, through transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vtr_export.reference import Reference, embed
from vtr_export.search.candidate import Candidate, Score
from vtr_export.search.evaluator import Outcome, Shard
from vtr_export.search.evaluators import torch_evaluator
from vtr_export.search.evaluators.prompts import agreed_share
from vtr_export.search.evaluators.torch_evaluator import TorchEvaluator
from vtr_export.search.evaluators.torch_model import Batch
from vtr_export.search.questions.calibration import CalibrationSet, Question
from vtr_export.search.questions.metrics import get_metric

DIGITS = Path(__file__).parents[1] / "samples" / "digits"
NEW_TOKENS, TOKENS, COUNT = 4, 144, 18
KEEPS = (TOKENS, 12, 5, 2, 1, 0, 0, 0)  # too few: many answers change
SCORES = (Score("previous", "text", "mean"), Score("next", "last", "max"))


@pytest.fixture(scope="module")
def questions() -> tuple[Question, ...]:
    return CalibrationSet.load(DIGITS / "questions.jsonl", limit=COUNT, seed=5).questions


def shard_of(questions: tuple[Question, ...], rows: Sequence[int]) -> Shard:
    return Shard.of(0, tuple(rows), tuple(questions[row].sha256 for row in rows))


def evaluator(questions: tuple[Question, ...], metric: str = "exact") -> TorchEvaluator:
    blocks = [questions]
    return TorchEvaluator(DIGITS / "model", blocks, get_metric(metric), max_new_tokens=NEW_TOKENS)


class Alone:
    """Each question by itself, by transformers' processor, without drafts or held calls."""

    def __init__(self) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(DIGITS / "model")
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(DIGITS / "model")

    @torch.no_grad()
    def ask(
        self, candidate: Candidate, question: Question, forced: list[int]
    ) -> tuple[list[int], torch.Tensor]:
        """The greedy answer, and log-probabilities ``[forced, vocab]`` along ``forced``."""
        from PIL import Image

        from vtr_export.families import read_facts

        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        image = Image.open(question.images[0])
        inputs = self.processor(images=[image], text=[text], return_tensors="pt")
        mask = inputs["attention_mask"]
        embeds, vision = embed(self.model, inputs["input_ids"], mask, inputs["pixel_values"])
        facts = read_facts(self.model.config.to_dict(), "digits")
        decoder = Reference(
            self.model.model.language_model, self.model.lm_head, candidate.resolve(facts)
        )
        ends = [self.processor.tokenizer.eos_token_id]
        table = self.model.get_input_embeddings()
        said = decoder.generate(table, embeds, mask, vision, max_new_tokens=NEW_TOKENS, eos=ends)
        tokens = said.tokens[0].tolist()
        step = said.prefill
        logits = [step.logits[0, -1]]
        for token in forced[:-1]:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            position = torch.tensor([[mask.shape[1] - 1]])
            step = decoder(
                table(torch.tensor([[token]])), mask, position, vision[:, :0], step.cache
            )
            logits.append(step.logits[0, -1])
        return tokens, torch.stack(logits).log_softmax(-1)

    def text(self, tokens: list[int]) -> str:
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


@pytest.fixture(scope="module")
def alone() -> Alone:
    return Alone()


@pytest.fixture(scope="module")
def drafts(alone: Alone, questions: tuple[Question, ...]) -> list[list[int]]:
    unpruned = Candidate((TOKENS,) * 8, Score(), TOKENS)
    return [alone.ask(unpruned, question, [0])[0] for question in questions]


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_answers_and_divergences_are_those_of_each_question_alone(
    alone: Alone, questions: tuple[Question, ...], drafts: list[list[int]], score: Score
) -> None:
    candidate = Candidate(KEEPS, score, TOKENS)
    unpruned = Candidate((TOKENS,) * 8, score, TOKENS)
    rows = tuple(reversed(range(COUNT)))
    found = evaluator(questions).evaluate(candidate, shard_of(questions, rows))
    right, kl = [], []
    for row in rows:
        question, draft = questions[row], drafts[row]
        tokens, pruned = alone.ask(candidate, question, draft)
        _, whole = alone.ask(unpruned, question, draft)
        right.append(float(alone.text(tokens) == question.answers[0]))
        kl.append(float((whole.exp() * (whole - pruned)).sum(-1).mean()))
    assert 0 < sum(right) < COUNT, "neither nothing nor everything may be lost"
    np.testing.assert_array_equal(found.metric, right)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-3, atol=1e-5)


def test_unpruned_answers_are_the_models_own(
    alone: Alone, questions: tuple[Question, ...], drafts: list[list[int]]
) -> None:
    found = evaluator(questions).unpruned(0)
    right = [
        float(alone.text(draft) == question.answers[0])
        for draft, question in zip(drafts, questions, strict=True)
    ]
    np.testing.assert_array_equal(found.metric, right)
    assert (found.margin > 0).all()


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_what_is_settled_changes_the_cost_alone(
    questions: tuple[Question, ...], score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_evaluator, "SHARD", 5)  # held calls are made of several parts
    whole, halves = tuple(range(COUNT)), (tuple(range(0, COUNT, 2)), tuple(range(1, COUNT, 2)))
    fresh, held = evaluator(questions), evaluator(questions)
    prefix = Candidate((TOKENS, 60, 60, 60, 60, 60, 60, 60), score, TOKENS)
    held.settle(prefix, 1)
    for keep in (60, 20):
        one = prefix.with_tail(2, keep)
        assert_alike(held, fresh, one, whole, questions)
    held.settle(prefix, 4)
    for rows in halves:
        one = prefix.with_tail(4, 2)
        expected, found = assert_alike(held, fresh, one, rows, questions)
    assert found.decoder_flops < 0.5 * expected.decoder_flops, "only what remains is computed"
    other = Candidate(KEEPS, score, TOKENS)
    assert_alike(held, fresh, other, whole, questions)
    rescored = Candidate(one.keeps, SCORES[score == SCORES[0]], TOKENS)
    assert_alike(held, fresh, rescored, whole, questions)
    held.settle(Candidate((TOKENS,) * 8, score, TOKENS), 2)
    for cut in (2, 3):
        later = Candidate((TOKENS,) * cut + (5,) * (8 - cut), rescored.score, TOKENS)
        assert_alike(held, fresh, later, whole, questions)


def test_where_nothing_is_shared_only_the_shards_questions_are_computed(
    questions: tuple[Question, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tested, built = evaluator(questions), list[int]()
    whole = tested.evaluate(Candidate(KEEPS, SCORES[0], TOKENS), shard_of(questions, range(COUNT)))
    batch = tested.model.batch

    def counted(asked: Sequence[Question], drafts: Sequence[Any] = ()) -> Batch:
        built.extend([len(asked)] if drafts else [])
        return batch(asked, drafts)

    monkeypatch.setattr(tested.model, "batch", counted)
    tested.settle(Candidate((TOKENS,) * 8, SCORES[0], TOKENS), 2)
    rows = (7, 2, 11)
    some = tested.evaluate(Candidate(KEEPS, SCORES[0], TOKENS), shard_of(questions, rows))
    assert built == [len(rows)]
    np.testing.assert_array_equal(some.metric, whole.metric[list(rows)])
    np.testing.assert_allclose(some.kl, whole.kl[list(rows)], rtol=1e-3, atol=1e-5)
    later = Candidate((TOKENS, TOKENS, *KEEPS[2:]), SCORES[0], TOKENS)
    for _ in range(2):
        tested.evaluate(later, shard_of(questions, rows))
    assert built == [len(rows), COUNT], "what is settled is computed once, for the whole block"


@pytest.mark.parametrize(
    ("said", "share"),
    [((7, 8, 2), 1), ((7, 8, 9, 4), 2 / 3), ((7, 3, 2), 1 / 3), ((1, 8, 2), 0), ((7, 8), 2 / 3)],
)
def test_agreement_ends_at_the_first_difference(said: tuple[int, ...], share: float) -> None:
    assert agreed_share((7, 8, 2), said) == share


def assert_alike(
    held: TorchEvaluator,
    fresh: TorchEvaluator,
    candidate: Candidate,
    rows: tuple[int, ...],
    questions: tuple[Question, ...],
) -> tuple[Outcome, Outcome]:
    shard = shard_of(questions, rows)
    expected, found = fresh.evaluate(candidate, shard), held.evaluate(candidate, shard)
    np.testing.assert_array_equal(found.metric, expected.metric)
    np.testing.assert_allclose(found.kl, expected.kl, rtol=1e-3, atol=1e-5)
    return expected, found


def test_metrics_without_labels(questions: tuple[Question, ...]) -> None:
    candidate = Candidate(KEEPS, SCORES[0], TOKENS)
    shard = shard_of(questions, tuple(range(COUNT)))
    agreement = evaluator(questions, "agreement")
    divergence = evaluator(questions, "kl").evaluate(candidate, shard)
    agreed, exact = (one.evaluate(candidate, shard) for one in (agreement, evaluator(questions)))
    np.testing.assert_array_equal(agreement.unpruned(0).metric, np.ones(COUNT))
    np.testing.assert_array_equal(divergence.metric, -divergence.kl)
    unpruned = evaluator(questions).unpruned(0).metric
    same = agreed.metric == 1
    assert 0 < same.sum() < COUNT
    np.testing.assert_array_equal(exact.metric[same], unpruned[same])
    assert set(agreed.metric[~same]) <= {0.0, 0.5, 1 / 3, 2 / 3}
