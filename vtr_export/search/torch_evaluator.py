"""Evaluations on the PyTorch reference; what candidates share is computed once and held."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vtr_export.reference import Generation, Held
from vtr_export.search.calibration import Question
from vtr_export.search.candidate import Candidate, Space
from vtr_export.search.evaluator import Floats, Outcome, Shard, Unpruned
from vtr_export.search.metrics import Metric
from vtr_export.search.prompts import SHARD, Draft, agreed_share, metric_of
from vtr_export.search.torch_model import TorchModel, hash_folder
from vtr_export.search.work import Width, call_flops, step_flops


@dataclass(frozen=True)
class _Shared:
    """A shard's call as far as candidates agree: ``prefix`` says up to where."""

    call: Held
    prefix: Candidate
    width: Width


@dataclass(frozen=True)
class _Expected:
    """What the unpruned model says to a shard's drafts."""

    tokens: Tensor  # [B, A]; -1 behind the shorter drafts
    call: Held  # after the last layer, its last A columns alone: logits would be large


class TorchEvaluator:
    """A checkpoint under the reference's cuts, with the questions of a calibration set."""

    def __init__(
        self,
        model: Path,
        blocks: Sequence[Sequence[Question]],
        metric: Metric,
        *,
        device: str = "cpu",
        dtype: str = "fp32",
        max_new_tokens: int = 16,
    ) -> None:
        self.model = TorchModel(model, device, dtype)
        self.blocks, self.metric = blocks, metric
        self.dtype, self.max_new_tokens = dtype, max_new_tokens
        self._drafts: dict[int, list[Draft]] = {}
        self._settled: tuple[Candidate, int] | None = None
        self._shared: dict[str, _Shared] = {}
        self._expected: dict[str, _Expected] = {}

    @property
    def space(self) -> Space:
        """Every layer, every score."""
        return Space(self.model.facts)

    def fingerprint(self) -> Mapping[str, str]:
        """Model, precision, and how long answers may be."""
        return {
            "evaluator": "reference",
            "model": hash_folder(self.model.folder),
            "dtype": self.dtype,
            "device": self.model.device.partition(":")[0],
            "max_new_tokens": str(self.max_new_tokens),
        }

    def unpruned(self, block: int) -> Unpruned:
        """Answer greedily; the answers become the drafts."""
        questions, flops = self.blocks[block], 0
        drafts = list[Draft]()
        for start in range(0, len(questions), SHARD):
            asked = questions[start : start + SHARD]
            said, spent = self._generate(self.space.unpruned(), asked)
            drafts += [self._draft(question, said, row) for row, question in enumerate(asked)]
            flops += spent
        self._drafts[block] = drafts
        metric, margin = ([d.metric for d in drafts], [d.margin for d in drafts])
        return Unpruned(np.array(metric), np.array(margin), flops)

    def settle(self, candidate: Candidate, layer: int) -> None:
        """What enters ``layer`` is held from now on, shard by shard as they come."""
        self._settled = candidate, layer

    def evaluate(self, candidate: Candidate, shard: Shard) -> Outcome:
        """Check the drafts in one call; where one fails, answer anew."""
        expected, flops = self._expectation(shard)
        shared, spent = self._share(candidate, shard)
        end, last = self._finish(candidate, shared)
        log_probs = self._log_probs(end)
        kl = _divergence(expected.tokens, self._log_probs(expected.call), log_probs)
        said = log_probs.argmax(-1).masked_fill(expected.tokens < 0, -1)
        metric, again = self._metric(candidate, shard, said.tolist(), kl)
        return Outcome(metric, kl, flops + spent + last + again)

    def _metric(
        self, candidate: Candidate, shard: Shard, said: Sequence[Sequence[int]], kl: Floats
    ) -> tuple[Floats, int]:
        """Each question's metric: its draft's where that holds; and what answering anew cost."""
        drafts = self._drafts_of(shard)
        agreed = [agreed_share(d.tokens, tokens) for d, tokens in zip(drafts, said, strict=True)]
        metric = np.array([draft.metric for draft in drafts])
        unlike = [row for row, share in enumerate(agreed) if share < 1]
        texts, flops = dict[int, str](), 0
        if self.metric.text is None:
            unlike = list(range(len(drafts)))
        elif unlike:
            asked = [self._question(shard, row) for row in unlike]
            answers, flops = self._generate(candidate, asked)
            texts = {row: self._text(answers, i) for i, row in enumerate(unlike)}
        for row in unlike:
            question, text = self._question(shard, row), texts.get(row, "")
            metric[row] = metric_of(self.metric, question, text, agreed[row], float(kl[row]))
        return metric, flops

    def _share(self, candidate: Candidate, shard: Shard) -> tuple[_Shared, int]:
        """The furthest call that ``candidate`` can go on from, once brought to what is settled."""
        shared, flops = self._shared.get(shard.sha256), 0
        if shared is None or not _agree(shared.prefix, candidate, shared.call.layer):
            shared = self._begin(shard)
        if self._settled is None or not _agree(self._settled[0], candidate, self._settled[1]):
            return shared, flops
        prefix, layer = self._settled
        if shared.call.layer < layer:
            runs = self.model.reference(prefix.resolve(self.model.facts))
            call = runs.advance(shared.call, layer)
            first = shared.call.layer
            flops = call_flops(self.model.facts, prefix, shared.width, first, layer, 0)
            shared = _Shared(call, prefix, shared.width)
            self._shared[shard.sha256] = shared
        return shared, flops

    def _begin(self, shard: Shard) -> _Shared:
        """A shard's call before layer 0."""
        questions = [self._question(shard, row) for row in range(len(shard))]
        batch = self.model.batch(questions, [draft.tokens for draft in self._drafts_of(shard)])
        return _Shared(self.model.hold(batch), self.space.unpruned(), batch.width)

    def _finish(self, candidate: Candidate, shared: _Shared) -> tuple[Held, int]:
        """The call after the layers that remain."""
        facts = self.model.facts
        runs = self.model.reference(candidate.resolve(facts))
        end = runs.advance(shared.call, facts.layers)
        rows = 1 + end.streams.drafted
        spent = call_flops(facts, candidate, shared.width, shared.call.layer, facts.layers, rows)
        return end, spent

    def _expectation(self, shard: Shard) -> tuple[_Expected, int]:
        """What the unpruned model says to the drafts; computed once."""
        flops = 0
        if shard.sha256 not in self._expected:
            end, flops = self._finish(self.space.unpruned(), self._begin(shard))
            last = end.streams.hidden[:, -1 - end.streams.drafted :].clone()
            drafts = [draft.tokens for draft in self._drafts_of(shard)]
            padded = [[*tokens, *[-1] * (last.shape[1] - len(tokens))] for tokens in drafts]
            self._expected[shard.sha256] = _Expected(
                torch.tensor(padded, device=last.device),
                replace(end, streams=replace(end.streams, hidden=last)),
            )
        return self._expected[shard.sha256], flops

    def _log_probs(self, end: Held) -> Tensor:
        """``[B, A, vocab]`` of the next tokens, fp32."""
        runs = self.model.reference(self.space.unpruned().resolve(self.model.facts))
        return runs.logits(end).log_softmax(-1)

    def _generate(
        self, candidate: Candidate, questions: Sequence[Question]
    ) -> tuple[Generation, int]:
        """Answer from the beginning, greedily."""
        batch, facts = self.model.batch(questions), self.model.facts
        said = self.model.reference(candidate.resolve(facts)).generate(
            self.model.embed_tokens,
            batch.embeds,
            batch.mask,
            batch.vision,
            max_new_tokens=self.max_new_tokens,
            eos=self.model.ends,
        )
        steps = said.tokens.shape[1] - 1
        flops = call_flops(facts, candidate, batch.width, 0, facts.layers, 1)
        return said, flops + step_flops(facts, candidate, batch.width, steps)

    def _draft(self, question: Question, said: Generation, row: int) -> Draft:
        tokens = self._tokens(said, row)
        best = said.logits[row, : len(tokens)].topk(2).values
        text = self.model.prompts.text(tokens)
        metric = metric_of(self.metric, question, text, 1.0, 0.0)
        return Draft(tokens, metric, float((best[:, 0] - best[:, 1]).min()))

    def _tokens(self, said: Generation, row: int) -> tuple[int, ...]:
        """One answer, with the token that ended it."""
        tokens: list[int] = said.tokens[row].tolist()
        ends = [place for place, token in enumerate(tokens) if token in self.model.ends]
        return tuple(tokens[: ends[0] + 1] if ends else tokens)

    def _text(self, said: Generation, row: int) -> str:
        return self.model.prompts.text(self._tokens(said, row))

    def _question(self, shard: Shard, row: int) -> Question:
        return self.blocks[shard.block][shard.rows[row]]

    def _drafts_of(self, shard: Shard) -> list[Draft]:
        if shard.block not in self._drafts:
            self.unpruned(shard.block)
        return [self._drafts[shard.block][row] for row in shard.rows]


def _agree(one: Candidate, other: Candidate, layer: int) -> bool:
    """Whether a call under ``one`` held before ``layer`` serves ``other`` too."""
    if layer == 0:
        return True
    return one.keeps[:layer] == other.keeps[:layer] and one.score == other.score


def _divergence(tokens: Tensor, unpruned: Tensor, pruned: Tensor) -> Floats:
    """``[B]``: KL(unpruned ‖ pruned) in nats, mean over each draft's tokens."""
    is_real = tokens >= 0
    terms = (unpruned.exp() * (unpruned - pruned)).sum(-1).masked_fill(~is_real, 0)
    mean = terms.sum(1) / is_real.sum(1)
    return mean.clamp(min=0).double().cpu().numpy()
