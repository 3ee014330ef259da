"""What search proposes: keeps for every decoder layer, and the score that ranks tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from vtr_export import generators
from vtr_export.families import ModelFacts
from vtr_export.schedule import Cut, Keep, Resolved, Schedule

PERCENT = 100  # parts of an image whose tokens vary


@dataclass(frozen=True)
class Score:
    """Whose attention ranks the tokens; the ``score`` of the schedule language."""

    source: Literal["previous", "next"] = "previous"
    query: Literal["last", "text", "raters"] = "last"
    heads: Literal["mean", "max"] = "mean"

    def __str__(self) -> str:
        return f"from {self.source}, query {self.query}, heads {self.heads}"

    def to_data(self) -> dict[str, str]:
        """As a schedule spells it."""
        return {"from": self.source, "query": self.query, "heads": self.heads}


_SOURCES: tuple[Literal["previous", "next"], ...] = ("previous", "next")
_QUERIES: tuple[Literal["text", "last"], ...] = ("text", "last")
_HEADS: tuple[Literal["mean", "max"], ...] = ("mean", "max")
SCORES = tuple(Score(*choice) for choice in product(_SOURCES, _QUERIES, _HEADS))


@dataclass(frozen=True)
class Space:
    """What can be searched: a model's layers, and ``parts`` of an image's vision tokens.

    ``parts`` is the number of tokens where every image has the same, else 100.
    """

    facts: ModelFacts
    scores: tuple[Score, ...] = SCORES  # a tunable artifact has one

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.facts.layers

    @property
    def parts(self) -> int:
        """What a keep counts."""
        return self.facts.tokens_per_image or PERCENT

    def unpruned(self) -> "Candidate":
        """Everything is kept."""
        return Candidate((self.parts,) * self.layers, self.scores[0], self.parts)

    def step(self, layer: int, keep: int, score: Score) -> "Candidate":
        """``keep`` parts from ``layer`` on, all before it."""
        keeps = (self.parts,) * layer + (keep,) * (self.layers - layer)
        return Candidate(keeps, score, self.parts)


@dataclass(frozen=True)
class Candidate:
    """``keeps[l]`` of ``parts`` parts of the vision tokens enter decoder layer ``l``.

    Never growing; ``keeps[0] == parts``, for nothing has ranked the tokens before layer 0.
    """

    keeps: tuple[int, ...]
    score: Score
    parts: int

    def __post_init__(self) -> None:
        falls = all(a >= b for a, b in zip(self.keeps, self.keeps[1:], strict=False))
        if not falls or self.keeps[0] != self.parts or self.keeps[-1] < 0:
            raise ValueError(f"{self.keeps=} must start with {self.parts} and never grow")

    @property
    def is_unpruned(self) -> bool:
        """Nothing is dropped."""
        return self.keeps[-1] == self.parts

    @property
    def mean_keep(self) -> float:
        """Mean share of the vision tokens over the layers."""
        return sum(self.keeps) / (len(self.keeps) * self.parts)

    def with_tail(self, layer: int, keep: int) -> "Candidate":
        """The same before ``layer``, ``keep`` from there on."""
        keeps = self.keeps[:layer] + (keep,) * (len(self.keeps) - layer)
        return Candidate(keeps, self.score, self.parts)

    def key(self) -> str:
        """One line that names it, the same in every process."""
        score = "" if self.is_unpruned else f" {self.score.to_data()}"
        return f"{list(self.keeps)}/{self.parts}{score}"

    def cut_layers(self) -> tuple[int, ...]:
        """Layers that fewer tokens enter than the one before."""
        return tuple(i for i in range(1, len(self.keeps)) if self.keeps[i] < self.keeps[i - 1])

    def resolve(self, facts: ModelFacts) -> Resolved:
        """As the reference and the cost model take it."""
        return Resolved(
            layers=len(self.keeps),
            tokens_per_image=facts.tokens_per_image,
            cuts=tuple(Cut(i, Keep(self.keeps[i], self.parts)) for i in self.cut_layers()),
            source=self.score.source,
            query=self.score.query,
            heads=self.score.heads,
        )

    def schedule(
        self, facts: ModelFacts, origin: Mapping[str, Any], model: str | None = None
    ) -> Schedule:
        """A document that ``vtr export`` compiles; ``model`` as its own key would spell it."""
        varies = facts.tokens_per_image is None
        keeps = [f"{keep}%" if varies else keep for keep in self.keeps]
        data = generators.from_keeps(keeps, {"score": self.score.to_data()}, dict(origin))
        return Schedule.from_data(data if model is None else data | {"model": model})
