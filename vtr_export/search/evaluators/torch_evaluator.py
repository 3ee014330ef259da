"""Evaluations on the PyTorch reference; what candidates share is computed once and held."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vtr_export.reference import Generation, Held
from vtr_export.search.candidate import Candidate, Space
from vtr_export.search.evaluator import Floats, Outcome, Shard, Unpruned
from vtr_export.search.evaluators.prompts import SHARD, metric_of, metrics_by_drafts
from vtr_export.search.evaluators.torch_model import TorchModel, describe
from vtr_export.search.evaluators.work import Width, call_flops, step_flops
from vtr_export.search.questions.calibration import Question
from vtr_export.search.questions.metrics import Metric


@dataclass(frozen=True)
class _Shared:
    """A call of several questions as far as candidates agree: ``prefix`` says up to where."""

    call: Held
    prefix: Candidate
    width: Width

    def rows(self, rows: Sequence[int]) -> "_Shared":
        """Some of its questions."""
        return replace(self, call=self.call.rows(rows), width=replace(self.width, rows=len(rows)))


@dataclass(frozen=True)
class _Draft:
    """What the unpruned model answers to one question, greedily."""

    tokens: tuple[int, ...]  # with the end token, if one ended it
    metric: float
    margin: float  # least gap between the two best logits on the way
    hidden: Tensor  # [tokens, D]: what the head made them of; logits would be large


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
        self._drafts: dict[int, list[_Draft]] = {}
        self._settled: tuple[Candidate, int] | None = None
        self._shared: dict[int, _Shared] = {}  # by block

    @property
    def space(self) -> Space:
        """Every layer, every score."""
        return Space(self.model.facts)

    def fingerprint(self) -> Mapping[str, str]:
        """Model, precision, and how long answers may be."""
        model = self.model
        return describe(model.folder, model.device, self.dtype, self.max_new_tokens)

    def unpruned(self, block: int) -> Unpruned:
        """Answer greedily; the answers become the drafts."""
        questions, flops = self.blocks[block], 0
        drafts = list[_Draft]()
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

    @torch.no_grad()
    def evaluate(self, candidate: Candidate, shard: Shard) -> Outcome:
        """Check the drafts in one call; where one fails, answer anew."""
        shared, flops = self._share(candidate, shard)
        facts, runs = self.model.facts, self.model.reference(candidate.resolve(self.model.facts))
        hidden = runs.finish(shared.call.to(self.model.device))
        flops += call_flops(
            facts, candidate, shared.width, shared.call.layer, facts.layers, hidden.shape[1]
        )
        drafts = self._drafts_of(shard)
        log_probs = self._log_probs(hidden)
        kl = _divergence(drafts, self._log_probs(_stacked(drafts, hidden)), log_probs)
        metric, again = self._metric(candidate, shard, log_probs.argmax(-1).tolist(), kl)
        return Outcome(metric, kl, flops + again)

    def answer(
        self, candidate: Candidate, questions: Sequence[Question]
    ) -> tuple[list[float], int]:
        """Answer any questions greedily, sharing nothing: the metric of each, and the FLOPs."""
        said, flops = self._generate(candidate, questions)
        drafts = [self._draft(question, said, row) for row, question in enumerate(questions)]
        return [draft.metric for draft in drafts], flops

    def _metric(
        self, candidate: Candidate, shard: Shard, said: Sequence[Sequence[int]], kl: Floats
    ) -> tuple[Floats, int]:
        """Each question's metric: its draft's where that holds; and what answering anew cost."""
        questions = [self.blocks[shard.block][row] for row in shard.rows]
        spent = [0]

        def answer(rows: Sequence[int]) -> list[str]:
            answers, flops = self._generate(candidate, [questions[row] for row in rows])
            spent.append(flops)
            return [self._text(answers, i) for i in range(len(rows))]

        drafts = self._drafts_of(shard)
        return metrics_by_drafts(self.metric, questions, drafts, said, kl, answer), sum(spent)

    def _share(self, candidate: Candidate, shard: Shard) -> tuple[_Shared, int]:
        """The furthest call of the shard that ``candidate`` can go on from.

        Where ``candidate`` agrees with what is settled, the whole block is brought to it and held.
        """
        block, flops = shard.block, 0
        shared = self._shared.get(block)
        if shared is not None and not _agree(shared.prefix, candidate, shared.call.layer):
            shared = None
        prefix, layer = self._settled or (candidate, 0)
        if layer == 0 or not _agree(prefix, candidate, layer):
            return shared.rows(shard.rows) if shared else self._begin(block, shard.rows), flops
        shared = shared or self._begin(block, range(len(self.blocks[block])))
        if (first := shared.call.layer) < layer:
            flops = call_flops(self.model.facts, prefix, shared.width, first, layer, 0)
            call = self._advance(shared.call, prefix, layer)
            shared = self._shared[block] = replace(shared, call=call, prefix=prefix)
        return shared.rows(shard.rows), flops

    def _advance(self, call: Held, prefix: Candidate, layer: int) -> Held:
        """Go on to ``layer``, a few rows at a time; what is held stays on the CPU."""
        runs, device = self.model.reference(prefix.resolve(self.model.facts)), self.model.device
        rows = range(len(call.streams.mask))
        parts = [rows[start : start + SHARD] for start in range(0, len(rows), SHARD)]
        return Held.join(
            [runs.advance(call.rows(part).to(device), layer).to("cpu") for part in parts]
        )

    def _begin(self, block: int, rows: Sequence[int]) -> _Shared:
        """A call of a block's ``rows`` before layer 0."""
        drafts, questions = self._block_drafts(block), self.blocks[block]
        batch = self.model.batch(
            [questions[row] for row in rows], [drafts[row].tokens for row in rows]
        )
        return _Shared(self.model.hold(batch).to("cpu"), self.space.unpruned(), batch.width)

    def _log_probs(self, hidden: Tensor) -> Tensor:
        """``[B, A, vocab]`` of the next tokens, fp32."""
        logits: Tensor = self.model.head(hidden)
        return logits.float().log_softmax(-1)

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
            groups=batch.groups,
            max_new_tokens=self.max_new_tokens,
            eos=self.model.ends,
            positions=(batch.positions, batch.ahead),
        )
        steps = said.tokens.shape[1] - 1
        flops = call_flops(facts, candidate, batch.width, 0, facts.layers, 1)
        return said, flops + step_flops(facts, candidate, batch.width, steps)

    def _draft(self, question: Question, said: Generation, row: int) -> _Draft:
        tokens = self._tokens(said, row)
        best = said.logits[row, : len(tokens)].topk(2).values
        text = self.model.prompts.text(tokens)
        metric = metric_of(self.metric, question, text, 1.0, 0.0)
        margin = float((best[:, 0] - best[:, 1]).min())
        return _Draft(tokens, metric, margin, said.hidden[row, : len(tokens)].cpu())

    def _tokens(self, said: Generation, row: int) -> tuple[int, ...]:
        """One answer, with the token that ended it."""
        tokens: list[int] = said.tokens[row].tolist()
        ends = [place for place, token in enumerate(tokens) if token in self.model.ends]
        return tuple(tokens[: ends[0] + 1] if ends else tokens)

    def _text(self, said: Generation, row: int) -> str:
        return self.model.prompts.text(self._tokens(said, row))

    def _drafts_of(self, shard: Shard) -> list[_Draft]:
        drafts = self._block_drafts(shard.block)
        return [drafts[row] for row in shard.rows]

    def _block_drafts(self, block: int) -> list[_Draft]:
        if block not in self._drafts:
            self.unpruned(block)
        return self._drafts[block]


def _agree(one: Candidate, other: Candidate, layer: int) -> bool:
    """Whether a call under ``one`` held before ``layer`` serves ``other`` too.

    What was held ranks tokens by ``one``'s score, which is of no matter to who cuts later.
    """
    if one.keeps[:layer] != other.keeps[:layer]:
        return False
    return one.score == other.score or layer == 0 or other.keeps[layer] == other.parts


def _stacked(drafts: Sequence[_Draft], like: Tensor) -> Tensor:
    """The drafts' hidden states ``[B, A, D]``; zeros behind the shorter ones."""
    rows = torch.zeros_like(like)
    for row, draft in zip(rows, drafts, strict=True):
        row[: len(draft.hidden)] = draft.hidden
    return rows


def _divergence(drafts: Sequence[_Draft], unpruned: Tensor, pruned: Tensor) -> Floats:
    """``[B]``: KL(unpruned ‖ pruned) in nats, mean over each draft's tokens."""
    odds = unpruned.exp()
    terms = torch.where(odds > 0, odds * (unpruned - pruned), 0).sum(-1)
    means = [row[: len(draft.tokens)].mean() for row, draft in zip(terms, drafts, strict=True)]
    return torch.stack(means).clamp(min=0).double().cpu().numpy()
