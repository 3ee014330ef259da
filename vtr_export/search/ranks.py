"""Do layers agree on which vision tokens matter? Kendall's tau between their rankings.

arXiv 2412.00556 finds rankings by attention alike in every layer but the first: that one set of
tokens may serve all later layers is what a search for keeps that never grow rests on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from vtr_export.extras import require
from vtr_export.schedule import Cut, Keep, Resolved
from vtr_export.search.candidate import Score
from vtr_export.search.evaluator import Floats
from vtr_export.search.questions.calibration import Question

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vtr_export.search.evaluators.torch_model import TorchModel

SHARES = (0.5, 0.25, 0.125, 0.0625)  # of the vision tokens: the keeps overlaps are taken at


@dataclass(frozen=True)
class Overlap:
    """Of the tokens one layer ranks best, how many another ranks best too.

    The best ``share`` of the tokens, at least one; equal scores go to the lower index, as at a
    cut. Layers that know nothing of each other would share ``share``.
    """

    share: float
    mean: Floats  # [layers, layers] over the questions, 0 to 1


@dataclass(frozen=True)
class Ranks:
    """How alike decoder layers of the unpruned model rank the vision tokens of a question.

    ``tau`` is Kendall's tau-b, -1 to 1; NaN where a layer scores all tokens alike. ``query`` and
    ``heads`` as in a schedule; ``from`` only says which cut uses a layer's ranking.
    """

    query: str
    heads: str
    questions: int
    tau: Floats  # [layers, layers] mean over the questions
    spread: Floats  # [layers, layers] their standard deviation
    overlaps: tuple[Overlap, ...]

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.tau)

    @property
    def first(self) -> float:
        """Mean tau of layer 0 with each later layer."""
        return _mean(self.tau[0, 1:])

    @property
    def later(self) -> float:
        """Mean tau over the pairs without layer 0."""
        return _mean(_pairs(self.tau[1:, 1:]))

    @property
    def least(self) -> float:
        """Least tau of a pair without layer 0."""
        pairs = _pairs(self.tau[1:, 1:])
        return float(np.nanmin(pairs)) if np.isfinite(pairs).any() else float("nan")

    def table(self) -> list[list[str]]:
        """A head, then a row a layer: tau and overlaps with the later layers and the next."""
        shares = [f"top {100 * overlap.share:.3g} %" for overlap in self.overlaps]
        head = ["layer", "tau: next layer", "all later", "least", *(f"{s}: next" for s in shares)]
        return [head, *(self._row(layer) for layer in range(self.layers - 1))]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, to three digits after the point; null for NaN."""
        return {
            "query": self.query,
            "heads": self.heads,
            "questions": self.questions,
            "tau": _plain(self.tau),
            "spread": _plain(self.spread),
            "overlaps": [
                {"share": overlap.share, "mean": _plain(overlap.mean)} for overlap in self.overlaps
            ],
        }

    def dump(self) -> str:
        """``to_json`` as one line."""
        return json.dumps(self.to_json())

    def _row(self, layer: int) -> list[str]:
        later = self.tau[layer, layer + 1 :]
        least = np.nanmin(later) if np.isfinite(later).any() else np.nan
        numbers = [later[0], _mean(later), least]
        numbers += [overlap.mean[layer, layer + 1] for overlap in self.overlaps]
        return [str(layer), *(f"{round(number, 2) + 0.0:.2f}" for number in numbers)]  # no -0.00


def ranks(scores: Sequence[Floats], score: Score, shares: Sequence[float] = SHARES) -> Ranks:
    """Compare the layers of each question's scores ``[layers, V]``; V may differ, at least 2."""
    if not scores or any(len(each) < 2 or each.shape[1] < 2 for each in scores):
        raise ValueError("at least one question, two layers and two vision tokens are needed")
    taus = np.stack([_taus(each) for each in scores])
    overlaps = [
        Overlap(share, np.mean([_overlap(each, share) for each in scores], axis=0))
        for share in shares
    ]
    known = np.isfinite(taus)
    count = np.where(known.any(0), known.sum(0), np.nan)
    mean = np.where(known, taus, 0).sum(0) / count
    spread = np.sqrt(np.where(known, (taus - mean) ** 2, 0).sum(0) / count)
    return Ranks(score.query, score.heads, len(scores), mean, spread, tuple(overlaps))


def model_ranks(
    model: "TorchModel", questions: Sequence[Question], score: Score, rows: int = 16
) -> Ranks:
    """How the layers of ``model`` rank the images of ``questions``; ``rows`` in one call."""
    found: list[Floats] = []
    for start in range(0, len(questions), rows):
        batch = model.batch(questions[start : start + rows])
        inputs = batch.embeds, batch.mask, batch.vision
        decoder = model.model.get_decoder()
        found += layer_scores(decoder, model.head, score, inputs, batch.groups, batch.positions)
    return ranks([each for each in found if each.shape[1] > 1], score)


def layer_scores(
    decoder: "nn.Module",
    lm_head: "nn.Module",
    score: Score,
    inputs: "tuple[Tensor, Tensor, Tensor]",
    groups: "Tensor | None" = None,
    positions: "Tensor | None" = None,
) -> list[Floats]:
    """Every layer's score of every vision token, ``[layers, V]`` a row, in one unpruned prefill.

    ``inputs`` are embeds ``[B, S, D]``, mask ``[B, S]`` and vision index ``[B, V]`` as
    :func:`vtr_export.reference.embed` makes them. A cut that keeps everything stands before each
    layer and scores by that layer's own attention: so the last layer is scored too.
    """
    from vtr_export.reference import Reference, positions_of

    layers = len(decoder.layers)  # type: ignore[arg-type]  # a ModuleList, as the reference has it
    cuts = tuple(Cut(layer, Keep(1, 1)) for layer in range(layers))
    watched = Resolved(layers, None, cuts, source="next", query=score.query, heads=score.heads)
    embeds, mask, vision = inputs
    runs = Reference(decoder, lm_head, watched, attention="sdpa")
    positions = positions_of(mask) if positions is None else positions
    step = runs(embeds, mask, positions, vision, groups=groups)
    rows = np.stack([each.double().cpu().numpy() for each in step.scores], axis=1)
    is_real = (mask.gather(1, vision) != 0).cpu().numpy()
    return [row[:, real] for row, real in zip(rows, is_real, strict=True)]


def _taus(scores: Floats) -> Floats:
    """Tau-b of every pair of layers, ``[layers, layers]``."""
    kendalltau = require("scipy.stats", "search", "comparing rankings").kendalltau
    taus = np.eye(len(scores))
    for one, other in combinations(range(len(scores)), 2):
        taus[one, other] = taus[other, one] = kendalltau(scores[one], scores[other]).statistic
    return taus


def _overlap(scores: Floats, share: float) -> Floats:
    """Shared part of the layers' best tokens, ``[layers, layers]``."""
    keep = max(1, int(share * scores.shape[1]))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :keep]
    is_best = np.zeros(scores.shape)
    np.put_along_axis(is_best, best, 1.0, axis=1)
    shared: Floats = is_best @ is_best.T / keep
    return shared


def _pairs(square: Floats) -> Floats:
    """The entries above the diagonal."""
    above: Floats = square[np.triu_indices(len(square), 1)]
    return above


def _mean(values: Floats) -> float:
    """NaN entries left out."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _plain(square: Floats) -> list[list[float | None]]:
    return [[round(float(x), 3) if np.isfinite(x) else None for x in row] for row in square]
